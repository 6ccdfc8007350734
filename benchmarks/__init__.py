"""Measurements of speed, memory and endurance: `make bench` and `make torture`."""
