"""Networks of tickets, and the images of an evaluation at another size than that of their training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.support.samples import sample_provenance
from pipeline import models
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.sparse.layers import sparse_weights
from pipeline.tickets.format import ticket_of
from pipeline.tickets.store import TicketRef, TicketStore
from pipeline.training.shapes import check_eval_resolution


def ticket(folder: Path, name: str, **args: int) -> TicketRef:
    """Save a ticket of a dense network that was trained on images of 32 pixels."""
    model = models.build(name, num_classes=10, args=args)
    masks = {key: torch.ones_like(weight, dtype=torch.bool) for key, weight in sparse_weights(model).items()}
    about = {"model": name, "model_args": args, "num_classes": 10, "preprocessing": {"eval_resolution": 32}}
    store = TicketStore(folder, owner="run")
    store.save(ticket_of(model, masks, provenance=sample_provenance(**about)))
    (ref,) = store.list()
    return ref


def evaluated_at(side: int) -> Config:
    return load_config("imagenet_r50_s90", ["data.train=x", "data.val=x", f"data.eval_resolution={side}"])


def test_a_size_that_a_network_does_not_take_is_refused_with_the_key(tmp_path: Path) -> None:
    cnn = ticket(tmp_path / "cnn", "cifar_resnet8", width=8)
    vit = ticket(tmp_path / "vit", "timm/vit_tiny_patch16_224", img_size=32, depth=1)
    says = (
        r"^data.eval_resolution: timm/vit_tiny_patch16_224 does not run on images of 3×48×48 pixels: .*; do: choose a"
    )
    with pytest.raises(ConfigError, match=says):
        check_eval_resolution(evaluated_at(48), [cnn, vit])
    check_eval_resolution(evaluated_at(48), [cnn])
    check_eval_resolution(evaluated_at(32), [cnn, vit])
    # untrusted arguments are held against the tensors of the ticket before a network of that size is outlined
    of = dataclasses.replace(vit.provenance, model_args={"img_size": 32, "depth": 10**9})
    with pytest.raises(ConfigError, match="1000000000 is out of range for the"):
        check_eval_resolution(evaluated_at(48), [dataclasses.replace(vit, provenance=of)])
