"""Average many tickets into one network of the same density (Sup-tickets, arXiv 2205.15322).

The functions are pure. Tickets are folded in one by one, so that the memory of a single model is
enough for any number of tickets; a rule with a score needs that of a few models.
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
from pipeline.sparse.layers import NO_NORMS, NormShapes
from pipeline.sparse.update import magnitude_masks
from pipeline.superposition.rules import RULES, Offer

# (state, masks) -> a number that should rise, such as held-out accuracy
Score = Callable[[dict[str, Tensor], dict[str, Tensor]], float]


class TicketLike(Protocol):
    """The parts of a ticket that superposition reads; see `pipeline.tickets.format.Ticket`."""

    @property
    def state(self) -> dict[str, Tensor]:
        """The complete state_dict, 0 outside the masks."""
        ...

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean, True = active."""
        ...

    @property
    def buffers(self) -> frozenset[str]:
        """Names in ``state`` that are not parameters."""
        ...


@dataclass(frozen=True, eq=False)
class Superposition:
    """The network that superposed tickets become."""

    state: dict[str, Tensor]  # in the dtypes of the tickets, 0 outside ``masks``; buffers of the last included ticket
    masks: dict[str, Tensor]
    buffers: frozenset[str]
    shares: tuple[float, ...]  # of each ticket, in the order given; 1 for the first, 0 for a ticket that was left out

    @property
    def num_members(self) -> int:
        """Number of tickets that were included."""
        return sum(share > 0 for share in self.shares)

    @property
    def parts(self) -> list[float]:
        """The part that each ticket has in the result, before pruning: they sum to 1."""
        return [share * math.prod(1 - later for later in self.shares[i + 1 :]) for i, share in enumerate(self.shares)]


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
    norm_shapes: NormShapes = NO_NORMS,
) -> Superposition:
    """Fold tickets, in their order, into one network, pruned back by magnitude to ``num_active`` weights.

    Dense parameters, including those of BatchNorm, follow the rule too, except that
    ``connection_aware`` uses ``mean`` for them. Sums are in float32.

    Args:
        tickets: read once. For Sup-tickets the first is the state at the end of exploration, n = 0.
        num_active: active weights to keep: one number for a ranking over all layers, or one per
            layer for a ranking within each.
        rule: a line of `pipeline.superposition.rules.RULES`. ``mean``: W ← (1 − 1/(n+1))·W +
            1/(n+1)·W_n. ``connection_aware``: each weight is averaged over the tickets in whose
            masks its connection is active. ``moving``: W ← (1 − β)·W + β·W_n. ``interpolation``:
            W ← (1 − α)·W + α·W_n with the best-scoring α of ``coefficients``. ``greedy_soup``: the
            mean. The last two leave out a ticket that does not raise the score.
        weights: of the tickets, in their order, if the rule averages; None: equal.
        beta: β of ``moving``.
        coefficients: values of α that ``interpolation`` tries.
        prune_every: prune after every ticket (as in the authors' code), or once at the end. A
            network is always pruned before it is scored.
        score: needed by the rules that use one.
        norm_shapes: of the layers under weight_norm, the shape of their norms, none of which may be 0.

    Raises:
        IntegrityError: the tickets belong to different networks.
    """
    assert rule in RULES, f"{rule!r} is not one of {', '.join(RULES)}"
    how = RULES[rule]
    fold: _Fold | None = None
    best = -math.inf
    for ticket, weight in zip(tickets, repeat(1.0) if weights is None else weights, strict=weights is not None):
        if fold is None:
            fold = _Fold(ticket, weight, norm_shapes)
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
    """The running superposition.

    Holds weights and dense parameters in float32, and for each connection the sum of the weights of
    the tickets in which it is active.
    """

    def __init__(self, first: TicketLike, weight: float, norm_shapes: NormShapes) -> None:
        self.norm_shapes = norm_shapes
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
                # W + (W_n − W)·weight/total is the running mean over the tickets in which the
                # connection is active; where it is not, total may be 0
                running += torch.where(alive, (new - running) * offer.weight / self.alive[name], 0.0)
            else:
                running.mul_(1 - share).add_(new, alpha=share)

    def leave_out(self) -> None:
        self.shares.append(0.0)

    def prune(self, num_active: int | Mapping[str, int]) -> dict[str, Tensor]:
        if not self.alive:  # dense tickets
            return {}
        masks = magnitude_masks(
            {name: self.running[name] for name in self.alive}, num_active, norm_shapes=self.norm_shapes
        )
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
        """Prune a copy of this network and return its score."""
        assert score is not None, "this rule needs a score"
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
                "tickets of different networks cannot be superposed", do="pass only tickets of one run"
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
    """Return the fold with the best-scoring share, or without the ticket if none exceeds ``best``, and its score."""
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
