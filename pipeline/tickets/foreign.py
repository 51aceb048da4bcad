"""Sparse networks from elsewhere as tickets: which weights of a state_dict are active, by the layout of the file.

A layout is one row of :data:`LAYOUTS`: how a file keeps its masks. The tests make a file of each; no file
that others published has been imported yet.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import models
from pipeline.errors import ConfigError, DataError
from pipeline.sparse.layers import sparse_weights
from pipeline.tickets.format import Ticket
from pipeline.tickets.own import own_ticket
from pipeline.tickets.state_dict import ForeignState, read_state

Tensors = dict[str, Tensor]
# how torchvision prepares images for its ImageNet weights
IMAGENET: dict[str, Any] = {
    "eval_resolution": 224,
    "eval_ratio": 0.875,
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
    "eval_resize": "torchvision",
}


@dataclass(frozen=True)
class Found:
    """A file in plain form."""

    state: Tensors  # what the network computes with
    masks: Tensors  # boolean, by the name of the weight; empty where zeros are the masks


@dataclass(frozen=True)
class Layout:
    """How files of one kind keep a sparse network."""

    about: str
    matches: Callable[[ForeignState], bool]
    read: Callable[[ForeignState], Found]


def _is_mask(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and bool(((tensor == 0) | (tensor == 1)).all())


def _beside(found: ForeignState, endings: Sequence[str]) -> tuple[Tensors, Tensors]:
    """Split tensors named after a weight (``conv1.weight_mask``, ``conv1.mask``) from the others."""
    masks, state = {}, {}
    for name, tensor in found.tensors.items():
        ending = next((ending for ending in endings if name.endswith(ending)), None)
        base = None if ending is None else name.removesuffix(ending)
        owner = next((each for each in (base, f"{base}.weight", f"{base}weight") if each in found.tensors), None)
        if owner is None or base is None:
            state[name] = tensor
        else:
            masks[owner] = tensor
    return state, masks


def _multiplied(state: Tensors, masks: Tensors) -> Found:
    """Apply masks to the weights that they belong to."""
    found = dict(state)
    for name, mask in masks.items():
        if name not in state:
            raise DataError(f"{name}: the file has a mask of it, but not the weight", do="pass the whole state_dict")
        if mask.shape != state[name].shape or not _is_mask(mask):
            raise DataError(
                f"{name}: expected a mask of 0 and 1 of shape {list(state[name].shape)}, got {list(mask.shape)}",
                do="choose another --layout",
            )
        # 0 where it is pruned, and not -0, which a product would give; the active weights keep their bits
        found[name] = torch.where(mask.bool(), state[name], torch.zeros((), dtype=state[name].dtype))
    return Found(found, {name: mask.bool() for name, mask in masks.items()})


def _zeros(found: ForeignState) -> Found:
    return Found(dict(found.tensors), {})


ENDINGS = ("_mask", ".mask")


def _masks_beside(found: ForeignState) -> Found:
    return _multiplied(*_beside(found, ENDINGS))


def _masks_in_file(found: ForeignState) -> dict[str, Tensor] | None:
    """Return the masks that stand in the file beside the state_dict, under ``masks`` or ``mask``."""
    for key in ("masks", "mask"):
        held = found.others.get(key)
        if isinstance(held, dict) and held and all(isinstance(value, Tensor) for value in held.values()):
            return {str(name).removeprefix("module."): value for name, value in held.items()}
    return None


def _masks_apart(found: ForeignState) -> Found:
    masks = _masks_in_file(found) or {}
    return _multiplied(dict(found.tensors), masks)


def _torch_prune(found: ForeignState) -> Found:
    state, masks = {}, {}
    for name, tensor in found.tensors.items():
        if name.endswith("_orig"):
            state[name.removesuffix("_orig")] = tensor
        elif name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in found.tensors:
            masks[name.removesuffix("_mask")] = tensor
        else:
            state[name] = tensor
    return _multiplied(state, masks)


def _has_prune(found: ForeignState) -> bool:
    return any(
        f"{name.removesuffix('_orig')}_mask" in found.tensors for name in found.tensors if name.endswith("_orig")
    )


THRESHOLDS = ("sparseThreshold", "sparse_threshold")


def _str(found: ForeignState) -> Found:
    """Soft-threshold the weights: sign(w)·relu(|w| - sigmoid(s)), with one s for a layer (STR, arXiv 2002.03231)."""
    thresholds = {
        name.rpartition(".")[0]: tensor for name, tensor in found.tensors.items() if name.endswith(THRESHOLDS)
    }
    state, masks = {}, {}
    for name, tensor in found.tensors.items():
        owner, _, ending = name.rpartition(".")
        if name.endswith(THRESHOLDS):
            continue
        if ending == "weight" and owner in thresholds:
            tensor = torch.sign(tensor) * torch.relu(tensor.abs() - torch.sigmoid(thresholds[owner]))
            masks[name] = tensor != 0
        state[name] = tensor
    return _multiplied(state, masks)


def _is_same(one: Found, other: Found, names: Collection[str]) -> bool:
    """Return whether both readings of a file give the same masks and the same tensors of these names."""
    states = [{name: tensor for name, tensor in found.state.items() if name in names} for found in (one, other)]
    pairs = ((states[0], states[1]), (one.masks, other.masks))
    return all(
        first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
        for first, second in pairs
    )


# In the order in which they are recognised; ``zeros`` fits any file.
LAYOUTS: dict[str, Layout] = {
    "torch-prune": Layout("weight_orig and weight_mask of torch.nn.utils.prune", _has_prune, _torch_prune),
    "str": Layout(
        "a threshold beside each weight (STR, arXiv 2002.03231), by its sigmoid",
        lambda found: any(name.endswith(THRESHOLDS) for name in found.tensors),
        _str,
    ),
    "masks": Layout(
        "weight_mask or mask beside each weight (RigL, SRigL)",
        lambda found: bool(_beside(found, ENDINGS)[1]),
        _masks_beside,
    ),
    "masks-apart": Layout(
        "an entry masks beside the state_dict, by name (ITOP)",
        lambda found: _masks_in_file(found) is not None,
        _masks_apart,
    ),
    "zeros": Layout("weights that are 0 are pruned (sparseml, AC/DC, and any other)", lambda found: True, _zeros),
}


def import_ticket(
    path: Path,
    model: str,
    *,
    args: Mapping[str, Any] | None = None,
    num_classes: int = 0,
    layout: str = "auto",
    classes: Sequence[str] = (),
    preprocessing: Mapping[str, Any] | None = None,
    like: Ticket | None = None,
    run: str = "",
) -> tuple[Ticket, list[str]]:
    """Make a ticket of a sparse network that another project trained.

    Args:
        path: a state_dict, as :func:`pipeline.tickets.state_dict.read_state` reads it.
        model: what ``pipeline.models`` builds the network by.
        args: further arguments of the network.
        num_classes: number of outputs; 0: as ``like`` has, as many as there are ``classes``, or 1000.
        layout: a row of :data:`LAYOUTS`, or ``auto`` to recognise it.
        classes: names of the classes.
        preprocessing: how images are prepared, as for :func:`pipeline.tickets.own.save_ticket`.
        like: a ticket with the same classes and preparation of images, where these are not given.
        run: name of what trained it; empty: the name of the file.

    Returns:
        The ticket, and what is ambiguous about it, in words.

    Raises:
        ConfigError: the layout, the network or an argument is unknown.
        DataError: the file cannot be read, or does not fit the network.
    """
    if layout != "auto" and layout not in LAYOUTS:
        close = difflib.get_close_matches(layout, LAYOUTS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of auto, {', '.join(LAYOUTS)}"
        raise ConfigError(f"--layout: {layout!r} is not a layout", do=hint)
    file = read_state(path)
    fitting = [name for name, row in LAYOUTS.items() if row.matches(file)]
    if layout != "auto" and layout not in fitting:
        raise DataError(
            f"{path}: does not have the layout {layout!r}: {LAYOUTS[layout].about}", do=f"pass --layout {fitting[0]}"
        )
    chosen = fitting[0] if layout == "auto" else layout
    found = LAYOUTS[chosen].read(file)
    class_list = ""
    if like is not None:
        class_list = like.provenance.class_list_digest
        num_classes = num_classes or like.provenance.num_classes
        classes = classes or (like.network.classes if like.network is not None else ())
        preprocessing = preprocessing or like.provenance.preprocessing
    num_classes = num_classes or len(classes) or 1000
    network = models.build(model, num_classes=num_classes, args=dict(args or {}))
    counters = {name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}
    state = counters | found.state  # files of old versions of torch lack them
    shapes = {name: tensor.shape for name, tensor in state.items()}
    of_network = "set --model, --model-args and --num-classes to those of the file's network"
    models.require_shapes(network, shapes, model, whose=str(path), do=of_network)
    network.load_state_dict(state)
    can_be_sparse = sparse_weights(network)
    if strange := [name for name in found.masks if name not in can_be_sparse]:
        raise DataError(
            f"{path}: {strange[0]} has a mask, but is not a weight of {model} that can be sparse",
            do="choose another --layout",
        )
    said = []
    if layout == "auto" and len(fitting) > 2:  # ``zeros`` fits always
        other = LAYOUTS[fitting[1]].read(file)
        if not _is_same(found, other, network.state_dict().keys()):
            raise DataError(
                f"{path}: has the layouts {chosen!r} and {fitting[1]!r}, which give different networks",
                do=f"pass --layout {chosen} or --layout {fitting[1]}",
            )
        said.append(f"the file also has the layout {fitting[1]!r}, which gives the same network")
    masks = found.masks
    if not masks:
        masks = {name: weight.detach() != 0 for name, weight in can_be_sparse.items()}
        masks = {name: mask for name, mask in masks.items() if not bool(mask.all())}
        said.append("the masks are the weights that are not 0: an active weight that happens to be 0 counts as pruned")
    elif unmasked := [name for name in can_be_sparse if name not in masks and bool((can_be_sparse[name] == 0).any())]:
        said.append(f"{unmasked[0]} has weights that are 0, but no mask: it counts as dense")
    if not masks:
        raise DataError(f"{path}: no weight is 0 and there are no masks", do="pass a sparse network")
    origin = {"from": "import", "sha256": file.sha256, "name": path.name, "layout": chosen}
    ticket = own_ticket(
        network,
        masks,
        built_as=models.BuiltAs(model, num_classes, dict(args or {})),
        method="imported",
        run=run or path.stem,
        classes=classes,
        preprocessing=preprocessing,
        origin=origin,
        class_list=class_list,
    )
    if not preprocessing:
        said.append("how images are prepared is not known: pass --like or --imagenet, or set data.… in an evaluation")
    if not classes and not class_list:
        said.append("the classes have no names: pass --like, or --other-class-list in an evaluation")
    return ticket, said
