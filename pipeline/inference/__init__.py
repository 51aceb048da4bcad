"""Tickets in one's own code.

``load_ticket`` gives a torch network that prepares its own images, ``predict`` the classes of images
by name, and ``save_ticket`` writes a network of one's own loop; they need torch, numpy and
safetensors. ``SparseNetwork`` and ``SparseEnsemble`` run tickets on CPUs at the speed of their
sparsity; they also need llvmlite. The network itself comes from its library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.lazy import lazy_exports

if TYPE_CHECKING:
    from pipeline.inference.load import TicketNetwork, load_ticket, predict
    from pipeline.inference.network import SparseEnsemble, SparseNetwork
    from pipeline.tickets.own import save_ticket

__all__ = ["SparseEnsemble", "SparseNetwork", "TicketNetwork", "load_ticket", "predict", "save_ticket"]

__getattr__ = lazy_exports(
    __name__,
    {
        "SparseEnsemble": "pipeline.inference.network",
        "SparseNetwork": "pipeline.inference.network",
        "TicketNetwork": "pipeline.inference.load",
        "load_ticket": "pipeline.inference.load",
        "predict": "pipeline.inference.load",
        "save_ticket": "pipeline.tickets.own",
    },
)
