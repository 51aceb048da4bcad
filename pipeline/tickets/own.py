"""Tickets of networks that no run of this project trained: from one's own loop, and from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline import models
from pipeline.errors import ConfigError, WriteError
from pipeline.files import write_atomically
from pipeline.sparse.dense import DensePart, dense_part
from pipeline.sparse.exploration import num_active, num_weights
from pipeline.sparse.masks import mask_digest
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS
from pipeline.tickets.format import PREPROCESSING, Ticket, encode, ticket_of
from pipeline.tickets.network import Network, network_of
from pipeline.tickets.provenance import ORIGIN_MINOR, Provenance, class_list_digest, provenance_of

OWN = "own"  # the method of a Strategy that is not a row of METHODS


def save_ticket(
    model: nn.Module,
    sparsifier: Sparsifier,
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str] = (),
    preprocessing: Mapping[str, Any] | None = None,
    name: str | None = None,
    args: Mapping[str, Any] | None = None,
    index: int = 0,
    run: str = "own loop",
    batch: int = 0,
    overwrite: bool = False,
) -> Ticket:
    """Save a network that was trained in one's own loop as a ticket, which every command reads.

    For example::

        >>> save_ticket(model, sparsifier, "mine.safetensors", classes=["boot", "shirt"])  # doctest: +SKIP

    Args:
        model: the network, or its wrapper (DistributedDataParallel, ``torch.compile``).
        sparsifier: its Sparsifier.
        path: file to write, ``….safetensors``.
        classes: names of the classes, in the order of the outputs.
        preprocessing: how images are prepared, with the names of the configuration's ``data``:
            ``eval_resolution`` (pixels), ``eval_ratio``, ``mean`` and ``std`` (0–255 scale). Without
            these ``load_ticket`` cannot prepare images.
        name: what ``pipeline.models.build`` builds the network by. None: the name that it was built
            by, or else ``module:class`` of a class of one's own.
        args: further arguments of the network, with ``name``.
        index: position among the tickets of one folder.
        run: name of what trained the network.
        batch: images of one optimiser step, by which the ticket counts the images seen.
        overwrite: replace a file that exists already.

    Returns:
        The ticket that was written.

    Raises:
        ConfigError: an argument is invalid, or the number of classes is not known.
        DataError: ``name`` builds a network with other tensors.
        WriteError: the file exists already, or cannot be written.
        NumericsError: a weight is not finite.
    """
    model, target = plain_module(model), Path(path).expanduser()
    if target.suffix != ".safetensors":
        raise ConfigError(f"{target}: expected a file name that ends in .safetensors")
    if target.exists() and not overwrite:
        raise WriteError(f"{target}: already exists", do="choose another name, or pass overwrite=True")
    ticket = own_ticket(
        model,
        sparsifier.masks,
        built_as=built_as(model, name, args, num_classes=len(classes)),
        classes=classes,
        preprocessing=preprocessing,
        method=next((row for row, of in METHODS.items() if of == sparsifier.strategy), OWN),
        index=index,
        run=run,
        step=sparsifier.steps,
        samples_seen=sparsifier.steps * batch,
        r_s=sparsifier.r_s,
        seed=sparsifier.seed,
        dense=sparsifier.dense,
    )
    write_atomically(target, encode(ticket))
    return ticket


def own_ticket(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    built_as: models.BuiltAs,
    method: str,
    run: str,
    classes: Sequence[str] = (),
    preprocessing: Mapping[str, Any] | None = None,
    index: int = 0,
    step: int = 0,
    samples_seen: int = 0,
    r_s: float | None = None,
    seed: int = 0,
    dense: DensePart | None = None,
    origin: Mapping[str, Any] | None = None,
    class_list: str = "",
) -> Ticket:
    """Make a ticket of a network that no run trained.

    Args:
        model: the network; 0 outside its masks.
        masks: boolean, by parameter name.
        built_as: how ``pipeline.models`` builds the network.
        method: what it was trained with.
        run: name of what trained it.
        classes: names of the classes, in the order of the outputs.
        preprocessing: as for :func:`save_ticket`.
        index: position among the tickets of one folder.
        step: optimiser steps done.
        samples_seen: images seen.
        r_s: in-time over-parameterisation rate; None: the density.
        seed: of the masks.
        dense: what of the network has no mask; None: found out here.
        origin: where the weights come from, for the provenance.
        class_list: digest of the names of the classes, if only this is known of them.

    Raises:
        ConfigError: an argument is invalid.
        IntegrityError: a weight outside its mask is not zero.
    """
    density = num_active(masks) / num_weights(masks) if masks else 1.0
    dense = dense or dense_part(model, masks)
    classes = list(classes)
    provenance = Provenance(
        index=index,
        model=built_as.name,
        model_args=dict(built_as.args),
        num_classes=built_as.num_classes,
        method=method,
        phase=run,
        step=step,
        samples_seen=samples_seen,
        epochs=0.0,
        density=density,
        r_s=density if r_s is None else r_s,
        seed=seed,
        config_digest="",
        data_digest="",
        class_list_digest=class_list_digest(classes) if classes else class_list,
        mask_digest=mask_digest(masks),
        parent_run=run,
        preprocessing=_checked_preprocessing(preprocessing or {}),
        origin=dict(origin or {}),
    )
    total = num_weights(masks)
    described = Network(
        classes=tuple(classes),
        parameters=total + dense.num_parameters,
        density=dense.network_density(num_active(masks), total),
        dense={weight.name: weight.why for weight in dense.weights},
    )
    try:
        provenance_of(asdict(provenance), minor=ORIGIN_MINOR)
        network_of(
            {**asdict(described), "classes": classes},
            num_classes=built_as.num_classes,
            dense_parameters={name: each.numel() for name, each in model.named_parameters() if name not in masks},
            num_weights=total,
            keep=False,
        )
    except ValueError as error:
        raise ConfigError(f"ticket: {error}", do="correct the argument") from None
    return ticket_of(model, masks, provenance=provenance, network=described)


def built_as(model: nn.Module, name: str | None, args: Mapping[str, Any] | None, *, num_classes: int) -> models.BuiltAs:
    """Return how a network is built: by ``name``, as it was built, or by its class.

    Raises:
        ConfigError: the number of classes is not known, or ``name`` is unknown.
        DataError: ``name`` builds a network with other tensors.
    """
    known = models.built_as(model)
    if name is None and known is not None:
        return known
    num_classes = num_classes or (known.num_classes if known is not None else 0)
    if not num_classes:
        raise ConfigError(
            "classes: expected the names of the classes, because it is not known how many the network has",
            do='pass classes=["…", …], in the order of the outputs',
        )
    if name is None:
        kind = type(model)
        return models.BuiltAs(f"{kind.__module__}:{kind.__qualname__}", num_classes, {})
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    models.outline_for(shapes, name, num_classes=num_classes, args=dict(args or {}), whose="the network")
    return models.BuiltAs(name, num_classes, dict(args or {}))


def plain_module(model: nn.Module) -> nn.Module:
    """Return the network in a DistributedDataParallel, DataParallel or ``torch.compile``."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _checked_preprocessing(stated: Mapping[str, Any]) -> dict[str, Any]:
    if strange := sorted(stated.keys() - set(PREPROCESSING)):
        raise ConfigError(f"preprocessing: {strange[0]!r} is not one of {', '.join(PREPROCESSING)}")
    found = {key: list(value) if isinstance(value, tuple) else value for key, value in stated.items()}
    std = found.get("std")
    if isinstance(std, list) and all(isinstance(value, int | float) for value in std) and 0 < max(std, default=1) < 1:
        scaled = ", ".join(f"{255 * value:g}" for value in std)
        raise ConfigError(
            f"preprocessing: std: expected numbers on the 0–255 scale, got {std} on the 0–1 scale",
            do=f"multiply mean and std by 255: [{scaled}]",
        )
    return {key: found[key] for key in PREPROCESSING if key in found}
