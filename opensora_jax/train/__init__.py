"""The training loop, its state, optimizer, checkpoints and writers."""
