"""Collect the tensors of a checkpoint from engine and sparsifier, and restore them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distributed import session
from pipeline.engine.average import WeightAverage
from pipeline.engine.protocol import Engine
from pipeline.errors import IntegrityError
from pipeline.sparse.masks import pack_mask, unpack_mask
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.tickets.packing import pack_sparse, pack_values, unpack_sparse, unpack_values


def shared_state(
    engine: Engine, optimizer_state: Mapping[str, Mapping[str, Tensor]], sparsifier: Sparsifier
) -> dict[str, Tensor]:
    """Return the tensors that are the same on all ranks: weights, masks, optimiser and sparsifier state.

    Args:
        engine: holds the model.
        optimizer_state: state of every parameter, by parameter name and slot.
        sparsifier: holds the masks.
    """
    average = {} if engine.average is None else dict(engine.average.module.named_parameters())
    weights, averaged, masks, ever_active, further, *states = _on_host(
        dict(engine.model.named_parameters()),
        average,
        sparsifier.masks,
        sparsifier.ever_active,
        sparsifier.tensors(),
        *optimizer_state.values(),
    )
    tensors = {f"model/{key}": value for key, value in pack_sparse(weights, masks).items()}
    if averaged:
        tensors |= {f"average/{key}": value for key, value in pack_sparse(averaged, masks).items()}
    tensors |= {f"ever_active/{name}": pack_mask(mask) for name, mask in ever_active.items()}
    tensors |= {f"sparsifier/{key}": _snapshot(value) for key, value in further.items()}
    for name, state in zip(optimizer_state, states, strict=True):
        for key, value in state.items():
            is_sparse = name in masks and value.shape == weights[name].shape
            packed = pack_values(value, masks[name]) if is_sparse else _snapshot(value)
            tensors[f"optimizer/{key}/{name}"] = packed
    return tensors


def _on_host(*groups: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the tensors on the CPU: those of a GPU are copied, each once, into memory that it writes to by itself.

    The host waits once for all copies. Tensors of the CPU are not copied.
    """
    here = [{name: t.detach().to("cpu", non_blocking=True) for name, t in group.items()} for group in groups]
    if any(tensor.is_cuda for group in groups for tensor in group.values()):
        torch.cuda.current_stream().synchronize()
    return here


def _snapshot(tensor: Tensor) -> Tensor:
    """Copy a tensor, so that training does not change it."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def restore_shared(
    tensors: Mapping[str, Tensor], engine: Engine, sparsifier: Sparsifier, numbers: Mapping[str, Any]
) -> None:
    """Restore the tensors of :func:`shared_state`.

    Args:
        tensors: what :func:`shared_state` returned.
        engine: receives weights and optimiser state.
        sparsifier: receives masks and its own state.
        numbers: the sparsifier's counters.

    Raises:
        IntegrityError: the parameters are those of another model.
    """
    shapes = {name: tuple(weight.shape) for name, weight in sparsifier.weights.items()}
    state, masks = unpack_sparse(_under("model/", tensors), shapes)
    parameters = dict(engine.model.named_parameters())
    if state.keys() != parameters.keys():
        raise IntegrityError(
            "checkpoint: its parameters differ from those of this model", do="resume with the model it was saved with"
        )
    saved: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, value in _under("optimizer/", tensors).items():
        slot, name = key.split("/", 1)
        saved[name][slot] = value
    for name, parameter in parameters.items():
        # only the packed moments of sparse weights have one dimension: a state of the weight's own
        # shape has more, Adam's step count has none
        dense = {
            slot: unpack_values(value, masks[name]) if name in masks and value.dim() == 1 else value
            for slot, value in saved[name].items()
        }
        engine.set_state(parameter, state[name], dense)
    if engine.average is not None:
        _restore_average(engine.average, _under("average/", tensors), shapes, engine)
    ever_active = {name: unpack_mask(tensors[f"ever_active/{name}"], shape) for name, shape in shapes.items()}
    sparsifier.load_state_dict(
        {"masks": masks, "ever_active": ever_active, "numbers": numbers, "tensors": _under("sparsifier/", tensors)}
    )


@torch.no_grad()
def _restore_average(
    average: WeightAverage, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], engine: Engine
) -> None:
    """Restore the averaged weights. A run that had no average starts one from the network."""
    if not tensors:
        average.restart(engine.model)
        return
    values, _ = unpack_sparse(tensors, shapes)
    for name, parameter in average.module.named_parameters():
        parameter.copy_(values[name])


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def rank_state(engine: Engine) -> dict[str, Tensor]:
    """Return the tensors that differ between ranks: buffers and random-number state."""
    average = {} if engine.average is None else dict(engine.average.module.named_buffers())
    of_model, of_average = _on_host(dict(engine.model.named_buffers()), average)
    tensors = {f"buffer/{name}": _snapshot(buffer) for name, buffer in of_model.items()}
    tensors |= {f"average_buffer/{name}": _snapshot(buffer) for name, buffer in of_average.items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if session.device().type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_rank(folder: Path, old_world_size: int, engine: Engine, *, seed: int) -> dict[str, Tensor]:
    """Restore this rank's buffers and random-number state; return the tensors that this rank has saved.

    If the number of ranks has changed, take the mean of all ranks' buffers, seed the random numbers
    with ``seed``, and return none.
    """
    from safetensors.torch import load  # here, because nothing else in this module needs it

    is_same = old_world_size == session.world_size()
    ranks = [session.rank()] if is_same else range(old_world_size)
    states: list[dict[str, Tensor]] = [load((folder / f"rank-{rank}.safetensors").read_bytes()) for rank in ranks]
    restore_rank_from(states, engine, is_same=is_same, seed=seed)
    return states[0] if is_same else {}


def restore_rank_from(states: Sequence[Mapping[str, Tensor]], engine: Engine, *, is_same: bool, seed: int) -> None:
    """Restore what :func:`rank_state` returned: that of this rank, or, unless ``is_same``, of all ranks; see there."""
    _restore_buffers(engine.model, "buffer/", states)
    if engine.average is not None:
        has_average = any(key.startswith("average_buffer/") for key in states[0])
        _restore_buffers(engine.average.module, "average_buffer/" if has_average else "buffer/", states)
    if is_same:
        torch.set_rng_state(states[0]["rng/cpu"])
        if "rng/cuda" in states[0] and session.device().type == "cuda":
            torch.cuda.set_rng_state(states[0]["rng/cuda"])
    else:
        torch.manual_seed(seed)


@torch.no_grad()
def _restore_buffers(network: nn.Module, prefix: str, states: Sequence[Mapping[str, Tensor]]) -> None:
    """Restore the buffers saved under ``prefix``; with several states, floating ones are their mean."""
    for name, buffer in network.named_buffers():
        values = torch.stack([state[f"{prefix}{name}"] for state in states])
        buffer.copy_(values.double().mean(dim=0) if values.is_floating_point() and len(states) > 1 else values[0])
