"""One run, from its config to its record, and again from its record."""
