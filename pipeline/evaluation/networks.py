"""Make the setup of an evaluation from a configuration: networks of tickets, and their FLOPs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline import models
from pipeline.config.schema import Config
from pipeline.engine.torch_engine import autocast_dtype, place_model
from pipeline.evaluation.members import MicroBatches, Setup
from pipeline.evaluation.predict import EvalBatches
from pipeline.evaluation.sparse import SparseInference
from pipeline.sparse.flops import dense_flops, layer_macs, sparse_flops
from pipeline.tickets.format import Provenance, Ticket


def evaluation_setup(
    config: Config,
    *,
    train_loader: MicroBatches | None,
    held_out: EvalBatches | None = None,
    is_sparse: bool = False,
) -> Setup:
    """Return the configured setup, for the report at the end of training and for a later evaluation.

    Args:
        config: the configuration of the run, or of the evaluation.
        train_loader: recalibrates BatchNorm of superposed networks; None: no network is superposed.
        held_out: the held-out images that a superposition rule chooses with, if it does.
        is_sparse: run tickets and superposed networks by sparse inference, batches on as many threads as torch.
    """
    return Setup(
        config.evaluation,
        build_model=lambda ticket: network_for(ticket, config),
        flops_ratio=lambda provenance, masks: flops_ratio(provenance, masks, config),
        train_loader=train_loader,
        held_out=held_out,
        autocast_dtype=autocast_dtype(config.train),
        sparse=SparseInference(torch.get_num_threads(), config.data.eval_resolution) if is_sparse else None,
    )


def network_for(ticket: Ticket, config: Config) -> nn.Module:
    """Build a network that fits a ticket, on this rank's device and in the configured memory format.

    The ticket's weights are not loaded. Raises the errors of `models.build_for`.
    """
    of, shapes = ticket.provenance, {name: tensor.shape for name, tensor in ticket.state.items()}
    whose = f"ticket {of.index} of {of.parent_run}"
    fresh = models.build_for(shapes, of.model, num_classes=of.num_classes, args=of.model_args, whose=whose)
    return place_model(fresh, config.train)


def flops_ratio(provenance: Provenance, masks: Mapping[str, Tensor], config: Config) -> float:
    """Return the FLOPs of a prediction with these masks, relative to the dense network.

    They are counted at the training resolution.
    """
    side = config.data.train_resolution
    outline = models.outline(provenance.model, num_classes=provenance.num_classes, args=provenance.model_args)
    macs = layer_macs(outline, (3, side, side))
    return sparse_flops(macs, masks) / dense_flops(macs)
