"""How tickets become one network, a line of one table per rule.

Standard library only: a configuration is checked without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Offer:
    """What the share of the next ticket can depend on."""

    weight: float  # of the ticket
    total: float  # weights of the tickets that are in, and of this one
    beta: float
    coefficients: Sequence[float]


@dataclass(frozen=True)
class Rule:
    """W ← (1 − share)·W + share·W_n for one ticket after the other."""

    shares: Callable[[Offer], Sequence[float]]  # to try; one, unless the rule judges
    takes_weights: bool = False  # of the tickets
    by_connection: bool = False  # averages run over the tickets in which the connection is alive
    is_judged: bool = False  # a held-out score chooses the share, and a ticket that does not raise it is left out
    order: str = "first"  # which ticket comes first, of ORDERS


def _average(of: Offer) -> Sequence[float]:
    return [of.weight / of.total]


RULES = {
    "mean": Rule(_average, takes_weights=True),  # Sup-tickets, arXiv 2205.15322, as its authors' code; here and below
    "connection_aware": Rule(_average, takes_weights=True, by_connection=True),
    "moving": Rule(lambda of: [of.beta]),
    "interpolation": Rule(lambda of: of.coefficients, is_judged=True, order="last"),  # Lottery Pools, arXiv 2208.10842
    "greedy_soup": Rule(
        _average, takes_weights=True, is_judged=True, order="best"
    ),  # ours: after model soups, arXiv 2203.05482
}


# Lottery Pools goes from one ticket to its neighbours, the nearest first: from the last ticket that is backwards.
ORDERS: dict[str, Callable[[Sequence[Any], Callable[[Any], float]], list[Any]]] = {
    "first": lambda items, score: list(items),
    "last": lambda items, score: list(reversed(items)),
    "best": lambda items, score: sorted(items, key=score, reverse=True),
}


def ordered(items: Sequence[Item], rule: Rule, score: Callable[[Item], float]) -> list[Item]:
    """Tickets, given by index, in the order in which the rule takes them.

    Of equal scores the earlier ticket is the better.
    """
    return ORDERS[rule.order](items, score)
