"""Checkpoints of other programs, read without running them."""
