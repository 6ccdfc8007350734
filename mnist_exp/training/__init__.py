"""The core: K models that are trained as one. Knows torch and data, and nothing else."""
