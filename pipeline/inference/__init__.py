"""Run tickets on CPUs at the speed of their sparsity: ``SparseNetwork`` and ``SparseEnsemble``.

They need torch, numpy, safetensors and llvmlite; the network itself comes from its library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.lazy import lazy_exports

if TYPE_CHECKING:
    from pipeline.inference.network import SparseEnsemble, SparseNetwork

__all__ = ["SparseEnsemble", "SparseNetwork"]

__getattr__ = lazy_exports(
    __name__,
    {
        "SparseEnsemble": "pipeline.inference.network",
        "SparseNetwork": "pipeline.inference.network",
    },
)
