"""Checkpoints: committed whole or not at all, and independent of the layout they were written from."""
