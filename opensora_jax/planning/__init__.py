"""Compiling a training for a slice of TPU chips that need not be there, and reading the result."""
