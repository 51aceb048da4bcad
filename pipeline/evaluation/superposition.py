"""Superposition: many tickets averaged into one network of the same density (Sup-tickets, arXiv 2205.15322). Pure functions.

The tickets are folded one by one, so that the memory needed is that of one model, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.errors import IntegrityError
from pipeline.sparse.update import magnitude_masks

RULES = ("mean", "connection_aware", "moving")


class TicketLike(Protocol):
    """What superposition reads of a ticket: see `pipeline.tickets.format.Ticket`."""

    @property
    def state(self) -> dict[str, Tensor]: ...
    @property
    def masks(self) -> dict[str, Tensor]: ...
    @property
    def buffers(self) -> frozenset[str]: ...


@dataclass(frozen=True, eq=False)
class Superposition:
    """One network: ``state`` in the dtypes of the tickets, 0 outside ``masks``; its buffers are those of the last ticket."""

    state: dict[str, Tensor]
    masks: dict[str, Tensor]
    buffers: frozenset[str]
    num_members: int


def superpose(
    tickets: Iterable[TicketLike],
    num_active: int | Mapping[str, int],
    *,
    rule: str = "mean",
    beta: float = 0.5,
    prune_every: bool = True,
) -> Superposition:
    """Fold tickets, in their order, into one network, pruned back by magnitude to ``num_active`` weights.

    Args:
        tickets: read once. The first is the state at the end of exploration, n = 0.
        num_active: active weights to keep: one number for a ranking over all layers, one per layer for a ranking in each.
        rule: ``mean``: W ← (1 − 1/(n+1))·W + 1/(n+1)·W_n. ``connection_aware``: each weight averaged over the tickets in which its
            connection is alive, by their masks. ``moving``: W ← (1 − β)·W + β·W_n.
        beta: β of ``moving``.
        prune_every: prune after every ticket (the authors' code), or once at the end.

    Dense parameters, BatchNorm's affine ones included, follow ``mean`` (``moving`` under that rule). Sums are float32.
    Raises IntegrityError when the tickets are not of one network.
    """
    assert rule in RULES, f"{rule!r} is not one of {RULES}"
    fold: _Fold | None = None
    for ticket in tickets:
        if fold is None:
            fold = _Fold(ticket)
        else:
            fold.add(ticket, rule, beta)
            if prune_every:
                fold.prune(num_active)
    assert fold is not None, "nothing to superpose"
    masks = fold.prune(num_active)
    return Superposition(fold.result(), masks, fold.buffers, fold.num_members)


class _Fold:
    """The running superposition: weights and dense parameters in float32, and for each weight in how many tickets it was alive."""

    def __init__(self, first: TicketLike) -> None:
        self.num_members = 1
        self.buffers = first.buffers
        self.last = first.state
        self.names = [name for name in first.state if name not in first.buffers]
        self.running = {name: first.state[name].to(torch.float32, copy=True) for name in self.names}
        self.num_alive = {name: mask.int() for name, mask in first.masks.items()}

    def add(self, ticket: TicketLike, rule: str, beta: float) -> None:
        self._check_same_network(ticket)
        self.num_members += 1
        self.last = ticket.state
        share = beta if rule == "moving" else 1 / self.num_members
        for name in self.names:
            running, new = self.running[name], ticket.state[name].float()
            if name in self.num_alive:
                alive = ticket.masks[name]
                self.num_alive[name] += alive
            if rule == "connection_aware" and name in self.num_alive:
                # W + (W_n − W)/count is the running mean over the tickets in which the connection is alive.
                running += torch.where(alive, (new - running) / self.num_alive[name].clamp_min(1), 0.0)
            else:
                running.mul_(1 - share).add_(new, alpha=share)

    def prune(self, num_active: int | Mapping[str, int]) -> dict[str, Tensor]:
        if not self.num_alive:  # dense tickets
            return {}
        masks = magnitude_masks({name: self.running[name] for name in self.num_alive}, num_active)
        for name, mask in masks.items():
            self.running[name].masked_fill_(~mask, 0.0)
            self.num_alive[name].masked_fill_(~mask, 0)
        return masks

    def result(self) -> dict[str, Tensor]:
        return {name: self.running[name].to(old.dtype) if name in self.running else old.clone() for name, old in self.last.items()}

    def _check_same_network(self, ticket: TicketLike) -> None:
        shapes = {name: tensor.shape for name, tensor in self.last.items()}
        if shapes != {name: tensor.shape for name, tensor in ticket.state.items()} or self.num_alive.keys() != ticket.masks.keys():
            raise IntegrityError("tickets of different networks cannot be superposed", do="give only the tickets of one run")
