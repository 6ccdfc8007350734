"""Augmentation of training images: batched, on the device, a draw for every image."""
