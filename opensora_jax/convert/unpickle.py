"""The pickles of PyTorch files, read by an interpreter that cannot call anything."""


class TorchFileError(ValueError):
    """A file of tensors that cannot be read, or that we refuse to read."""
