"""The rules by which tickets become one network: a table with one line per rule.

Standard library only, because a configuration is checked without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Offer:
    """What the share of the next ticket may depend on."""

    weight: float  # of the ticket
    total: float  # sum of the weights of all tickets included so far and of this one
    beta: float
    coefficients: Sequence[float]


@dataclass(frozen=True)
class Rule:
    """Fold in one ticket after the other: W ← (1 − share)·W + share·W_n."""

    shares: Callable[[Offer], Sequence[float]]  # the shares to try; a single one unless is_judged
    takes_weights: bool = False  # whether tickets can be weighted
    by_connection: bool = False  # average each weight over the tickets in which its connection is active
    is_judged: bool = False  # choose the share by a held-out score, and leave out tickets that do not raise it
    order: str = "first"  # a name of ORDERS: the order in which tickets are taken


def _average(of: Offer) -> Sequence[float]:
    return [of.weight / of.total]


RULES = {
    # Sup-tickets (arXiv 2205.15322), as in the authors' code: mean, connection_aware and moving
    "mean": Rule(_average, takes_weights=True),
    "connection_aware": Rule(_average, takes_weights=True, by_connection=True),
    "moving": Rule(lambda of: [of.beta]),
    "interpolation": Rule(lambda of: of.coefficients, is_judged=True, order="last"),  # Lottery Pools, arXiv 2208.10842
    # our own rule, after model soups (arXiv 2203.05482)
    "greedy_soup": Rule(_average, takes_weights=True, is_judged=True, order="best"),
}


# Lottery Pools starts at one ticket and adds its neighbours, nearest first; from the last ticket, that is backwards.
ORDERS: dict[str, Callable[[Sequence[Any], Callable[[Any], float]], list[Any]]] = {
    "first": lambda items, score: list(items),
    "last": lambda items, score: list(reversed(items)),
    "best": lambda items, score: sorted(items, key=score, reverse=True),
}


def ordered(items: Sequence[Item], rule: Rule, score: Callable[[Item], float]) -> list[Item]:
    """Sort tickets, given by index, into the order in which the rule takes them.

    Of two tickets with equal scores, the earlier one counts as better.
    """
    return ORDERS[rule.order](items, score)
