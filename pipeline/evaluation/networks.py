"""The network that a ticket belongs into, and what a prediction with it costs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from pipeline import models
from pipeline.config.schema import Config
from pipeline.engine.torch_engine import place_model
from pipeline.sparse.flops import dense_flops, layer_macs, sparse_flops
from pipeline.tickets.format import Provenance, Ticket


def network_for(ticket: Ticket, config: Config) -> nn.Module:
    """The network that a ticket belongs into, on this rank's device and in the configured memory format; its weights do not matter.

    Raises as `models.build_for`.
    """
    of, shapes = ticket.provenance, {name: tensor.shape for name, tensor in ticket.state.items()}
    whose = f"ticket {of.index} of {of.parent_run}"
    fresh = models.build_for(shapes, of.model, num_classes=of.num_classes, args=of.model_args, whose=whose)
    return place_model(fresh, config.train)


def flops_ratio(provenance: Provenance, masks: Mapping[str, Tensor], config: Config) -> float:
    """FLOPs of a prediction with these masks against those of the dense network, at the resolution of training."""
    side = config.data.train_resolution
    outline = models.outline(provenance.model, num_classes=provenance.num_classes, args=provenance.model_args)
    macs = layer_macs(outline, (3, side, side))
    return sparse_flops(macs, masks) / dense_flops(macs)
