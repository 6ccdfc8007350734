"""Where images come from: verified, split and normalised."""
