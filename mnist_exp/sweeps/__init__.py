"""Many runs as one object: their jobs, their stacks, and the report on them."""
