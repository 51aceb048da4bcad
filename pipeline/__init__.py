"""Sparse training from scratch at ImageNet scale: masks, tickets, superposition and ensembles.

The public names are those of :mod:`pipeline.sparse`, :mod:`pipeline.tickets`,
:mod:`pipeline.evaluation`, :mod:`pipeline.models` and :mod:`pipeline.inference`. Nothing heavy is imported here:
``pipeline.sparse`` and ``pipeline.evaluation`` need torch and numpy only, ``pipeline.tickets``
safetensors as well.
"""

from pipeline.moved import keep_old_paths

__all__ = ["__version__"]

__version__ = "0.1.0"  # the one place: pyproject.toml reads it here

keep_old_paths()
