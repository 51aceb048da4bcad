"""Superposition: many tickets averaged into one network of the same density (Sup-tickets, arXiv 2205.15322).

Pure functions.

The tickets are folded one by one, so that the memory needed is that of one model, however many
there are; a rule that judges needs a few.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol, Self

import torch
from torch import Tensor

from pipeline.errors import IntegrityError
from pipeline.sparse.update import magnitude_masks
from pipeline.superposition.rules import RULES, Offer

Score = Callable[
    [dict[str, Tensor], dict[str, Tensor]], float
]  # (state, masks) -> what is to rise, such as held-out accuracy


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
    """One network: ``state`` in the dtypes of the tickets, 0 outside ``masks``; its buffers are those of the last ticket that came in."""

    state: dict[str, Tensor]
    masks: dict[str, Tensor]
    buffers: frozenset[str]
    shares: tuple[float, ...]  # with which each ticket came in, in the order given; 1 for the first, 0: it was left out

    @property
    def num_members(self) -> int:
        """Tickets that came in."""
        return sum(share > 0 for share in self.shares)


def superpose(
    tickets: Iterable[TicketLike],
    num_active: int | Mapping[str, int],
    *,
    rule: str = "mean",
    weights: Sequence[float] | None = None,
    beta: float = 0.5,
    coefficients: Sequence[float] = (),
    prune_every: bool = True,
    score: Score | None = None,
) -> Superposition:
    """Fold tickets, in their order, into one network, pruned back by magnitude to ``num_active`` weights.

    Args:
        tickets: read once. For Sup-tickets the first is the state at the end of exploration, n = 0.
        num_active: active weights to keep: one number for a ranking over all layers, one per layer
            for a ranking in each.
        rule: a line of `pipeline.superposition.rules.RULES`. ``mean``: W ← (1 − 1/(n+1))·W +
            1/(n+1)·W_n. ``connection_aware``: each weight averaged over the tickets in which its
            connection is alive, by their masks. ``moving``: W ← (1 − β)·W + β·W_n.
            ``interpolation``: W ← (1 − α)·W + α·W_n with the α of ``coefficients`` that scores
            best. ``greedy_soup``: the mean. The last two leave a ticket out that does not raise the
            score.
        weights: of the tickets, in their order, where the rule averages; None: equal.
        beta: β of ``moving``.
        prune_every: prune after every ticket (the authors' code), or once at the end. What is scored is always pruned.
        score: needed by a rule that judges.

    Dense parameters, BatchNorm's affine ones included, follow ``mean`` under ``connection_aware``,
    else the rule. Sums are float32. Raises IntegrityError when the tickets are not of one network.
    """
    assert rule in RULES, f"{rule!r} is not one of {', '.join(RULES)}"
    how = RULES[rule]
    fold: _Fold | None = None
    best = -math.inf
    for ticket, weight in zip(tickets, repeat(1.0) if weights is None else weights, strict=weights is not None):
        if fold is None:
            fold = _Fold(ticket, weight)
            best = fold.judged(num_active, score) if how.is_judged else best
            continue
        fold.check_same_network(ticket)
        offer = Offer(weight, fold.total + weight, beta, coefficients)
        if how.is_judged:
            fold, best = _best(
                fold, ticket, offer, how.shares(offer), best=best, judged=lambda trial: trial.judged(num_active, score)
            )
        else:
            (share,) = how.shares(offer)
            fold.add(ticket, share, offer, by_connection=how.by_connection)
        if prune_every:
            fold.prune(num_active)
    assert fold is not None, "nothing to superpose"
    masks = fold.prune(num_active)
    return Superposition(fold.result(), masks, fold.buffers, tuple(fold.shares))


class _Fold:
    """The running superposition: weights and dense parameters in float32, and per connection the weight of the tickets that have it."""

    def __init__(self, first: TicketLike, weight: float) -> None:
        self.total = weight
        self.shares = [1.0]
        self.buffers = first.buffers
        self.last = first.state
        self.names = [name for name in first.state if name not in first.buffers]
        self.running = {name: first.state[name].to(torch.float32, copy=True) for name in self.names}
        self.alive = {name: mask.float() * weight for name, mask in first.masks.items()}

    def add(self, ticket: TicketLike, share: float, offer: Offer, *, by_connection: bool = False) -> None:
        self.total = offer.total
        self.shares.append(share)
        self.last = ticket.state
        for name in self.names:
            running, new = self.running[name], ticket.state[name].float()
            if name in self.alive:
                alive = ticket.masks[name]
                self.alive[name] += alive * offer.weight
            if by_connection and name in self.alive:
                # W + (W_n − W)·weight/total is the running mean over the tickets that have the
                # connection; total may be 0 elsewhere.
                running += torch.where(alive, (new - running) * offer.weight / self.alive[name], 0.0)
            else:
                running.mul_(1 - share).add_(new, alpha=share)

    def leave_out(self) -> None:
        self.shares.append(0.0)

    def prune(self, num_active: int | Mapping[str, int]) -> dict[str, Tensor]:
        if not self.alive:  # dense tickets
            return {}
        masks = magnitude_masks({name: self.running[name] for name in self.alive}, num_active)
        for name, mask in masks.items():
            self.running[name].masked_fill_(~mask, 0.0)
            self.alive[name].masked_fill_(~mask, 0.0)
        return masks

    def result(self) -> dict[str, Tensor]:
        return {
            name: self.running[name].to(old.dtype) if name in self.running else old.clone()
            for name, old in self.last.items()
        }

    def copy(self) -> Self:
        other = copy.copy(self)
        other.shares = list(self.shares)
        other.running = {name: tensor.clone() for name, tensor in self.running.items()}
        other.alive = {name: tensor.clone() for name, tensor in self.alive.items()}
        return other

    def judged(self, num_active: int | Mapping[str, int], score: Score | None) -> float:
        """The score of this network, pruned."""
        assert score is not None, "a rule that judges needs a score"
        pruned = self.copy()
        masks = pruned.prune(num_active)
        return score(pruned.result(), masks)

    def check_same_network(self, ticket: TicketLike) -> None:
        shapes = {name: tensor.shape for name, tensor in self.last.items()}
        if (
            shapes != {name: tensor.shape for name, tensor in ticket.state.items()}
            or self.alive.keys() != ticket.masks.keys()
        ):
            raise IntegrityError(
                "tickets of different networks cannot be superposed", do="give only the tickets of one run"
            )


def _best(
    fold: _Fold,
    ticket: TicketLike,
    offer: Offer,
    shares: Sequence[float],
    *,
    best: float,
    judged: Callable[[_Fold], float],
) -> tuple[_Fold, float]:
    """The fold with the share that scores best, or without the ticket when none is above ``best``; and its score."""
    chosen: _Fold | None = None
    for share in shares:
        trial = fold.copy()
        trial.add(ticket, share, offer)
        reached = judged(trial)
        if reached > best:
            chosen, best = trial, reached
    if chosen is None:
        fold.leave_out()
    return chosen or fold, best
