"""raypipe: exact pipeline-parallel training of unmodified PyTorch models, on Ray."""

__version__ = "0.1.0"
