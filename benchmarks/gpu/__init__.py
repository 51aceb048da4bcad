"""The acceptance of a GPU: ``python -m benchmarks.gpu``."""
