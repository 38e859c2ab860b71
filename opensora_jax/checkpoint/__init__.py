"""Checkpoints of pytrees: written whole, checked when read, described."""
