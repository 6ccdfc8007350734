"""What is asked for: overrides and recipes, as a checked config. Knows Hydra, and no torch."""
