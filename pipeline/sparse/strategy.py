"""A sparse training method is a value.

Two rows of the table, read side by side, are the difference between two methods.

Standard library only: the configuration and the plan read this before torch is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Strategy:
    """One method: what is pruned and grown, where, and on which schedule its paper does so.

    Lengths are strings with a unit, at the plan's reference batch (``pipeline.plan``). The
    Sparsifier itself is given each drop fraction and density by its caller; the schedule fields are
    what ``pipeline.plan`` uses where the configuration says nothing else.
    """

    grow: str | None  # a row of ``criteria.GROW``; None: the topology never changes
    prune: str = "magnitude"  # a row of ``criteria.PRUNE``
    scope: str = "layer"
    distribution: str = "erk"
    initial: str = "random"  # a key of ``INITIAL``: which weights are active at first
    structure: str = "none"
    grow_share: float = 1.0  # of what grows, by ``grow``; the rest by ``grow_rest``
    grow_rest: str = "random"
    min_active: int = 1  # active weights that a ranking over all layers leaves in every layer
    # with ``fan_in``: salient weights that an output needs, as a share of its layer's fan-in, or it dies; 0: none dies
    min_salient: float = 0.0
    regrown: str = "kept"  # a key of ``REGROWN``: what a weight has that the same update prunes and regrows
    replaces_step: bool = False  # RigL's own code: an update takes the place of the optimiser step
    update_interval: str | None = None  # ΔT
    drop_schedule: str = "cosine"
    drop_fraction: float = 0.5  # p0
    drop_end: float = 0.005  # η
    initial_density: float | None = (
        None  # D_i of a falling (or rising) density; None: the density is the final one from the start
    )
    density_schedule: str = "cubic"  # a key of ``DENSITY_SCHEDULES``
    density_from: str = "0 epochs"  # t0 and t1 of the density schedule
    density_until: str = "30 epochs"

    @property
    def changes_masks(self) -> bool:
        """Whether masks change in training: weights are replaced, or the density moves."""
        return self.grow is not None or self.initial_density is not None

    @property
    def grow_stages(self) -> tuple[tuple[str, float], ...]:
        """(grow criterion, share of what is still to grow), in order."""
        if self.grow is None:
            return ()
        return ((self.grow, 1.0),) if self.grow_share == 1 else ((self.grow, self.grow_share), (self.grow_rest, 1.0))


METHODS: dict[str, Strategy] = {
    "dense": Strategy(grow=None, distribution="uniform"),
    "static": Strategy(grow=None),
    # SET, Nature Communications 9, 2383: each epoch, 30% of the weights nearest to zero of either
    # sign make way for random ones.
    "set": Strategy(
        "random",
        prune="sign_aware",
        distribution="er",
        update_interval="1 epochs",
        drop_schedule="constant",
        drop_fraction=0.3,
    ),
    # RigL, arXiv 1911.11134
    "rigl": Strategy("gradient", update_interval="100 steps", drop_schedule="rigl_cosine", drop_fraction=0.3),
    # SRigL, arXiv 2305.02299: RigL in which every output has the same fan-in, and outputs with few salient weights die
    "srigl": Strategy(
        "gradient",
        structure="fan_in",
        min_salient=0.3,
        update_interval="100 steps",
        drop_schedule="rigl_cosine",
        drop_fraction=0.3,
    ),
    # ITOP, arXiv 2102.02887: SET and RigL with updates rare enough that new weights are explored reliably
    "set_itop": Strategy(
        "random", update_interval="1500 steps", drop_schedule="cosine", drop_fraction=0.5, drop_end=0.005
    ),
    "rigl_itop": Strategy(
        "gradient", update_interval="4000 steps", drop_schedule="cosine", drop_fraction=0.5, drop_end=0.005
    ),
    # SNFS, arXiv 1907.04840, without its redistribution over layers: each layer keeps its density
    "snfs": Strategy("momentum", update_interval="1 epochs", drop_schedule="cosine", drop_fraction=0.5, drop_end=0.0),
    # GraNet, arXiv 2106.10404
    "granet": Strategy(
        "gradient",
        regrown="zero_density",
        update_interval="4000 steps",
        drop_fraction=0.5,
        drop_end=0.0,
        initial_density=0.5,
    ),
    # In the manner of MEST, arXiv 2110.14032: the sure half by gradient, the other half at random
    "mixed": Strategy("gradient", grow_share=0.5, update_interval="4000 steps", drop_fraction=0.5, drop_end=0.005),
    # MEST (EM), arXiv 2110.14032, with the values of its code for 90% sparsity: 2%, then 1% of all weights mutate
    "mest": Strategy(
        "random",
        distribution="uniform",
        update_interval="5 epochs",
        drop_schedule="stairs",
        drop_fraction=0.2,
    ),
    # DSR, arXiv 1902.05967: weights move between layers; of ResNet-50's 5.1 million at 80%, its code moves 0.4 million
    "dsr": Strategy(
        "random",
        scope="reallocated",
        distribution="uniform",
        update_interval="2000 steps",
        drop_schedule="constant",
        drop_fraction=0.08,
    ),
    # GMP, gradual magnitude pruning, arXiv 1710.01878, eq. 1 from a dense network: nothing grows
    "gmp": Strategy(
        grow=None,
        distribution="uniform",
        update_interval="1000 steps",
        drop_schedule="constant",
        drop_fraction=0.0,
        initial_density=1.0,
    ),
    # AC/DC, arXiv 2106.12379: dense and sparse in turn, every 5 epochs of 100; pruned weights come back as 0
    "acdc": Strategy(
        "random",
        distribution="uniform",
        update_interval="5 epochs",
        drop_schedule="constant",
        drop_fraction=0.0,
        initial_density=1.0,
        density_schedule="alternating",
        density_from="10 epochs",
        density_until="85 epochs",
    ),
    # Masks that are chosen at initialisation and never change: by |w|, SNIP (arXiv 1810.02340), GraSP (2002.07376)
    # and SynFlow (2006.05467)
    "magnitude_init": Strategy(grow=None, initial="magnitude"),
    "snip": Strategy(grow=None, initial="snip"),
    "grasp": Strategy(grow=None, initial="grasp"),
    "synflow": Strategy(grow=None, initial="synflow"),
}


def find_strategy(method: str | Strategy) -> Strategy:
    """The Strategy itself, or the row of ``METHODS`` with this name.

    Raises:
        ConfigError: for a name that is not in the table.
    """
    if isinstance(method, Strategy):
        return method
    if method not in METHODS:
        close = difflib.get_close_matches(str(method), METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"method: {method!r} is not one of {', '.join(METHODS)}{hint}", do="correct the name, or pass a Strategy"
        )
    return METHODS[method]


def method(name: str, **changes: Any) -> Strategy:
    """The row ``name`` of the table, with every one of ``changes`` that is not None."""
    return dataclasses.replace(METHODS[name], **{key: value for key, value in changes.items() if value is not None})


SCOPES = {
    "layer": "every layer prunes its share and regrows as many",
    "global": "one ranking over all layers for pruning, one for growth",
    "global_normalised": "the same, with every layer's scores divided by their mean",
    "global_prune": "one ranking over all layers for pruning; every layer regrows what it lost (GraNet)",
    "reallocated": "one ranking over all layers for pruning; layers regrow in proportion to what they kept (DSR)",
}
REGROWN = {
    "kept": "a weight that an update prunes and regrows keeps its value and its optimiser state (ITOP, RigL)",
    "zero": "it starts at 0, without optimiser state, as any new weight does (FreeTickets)",
    "zero_density": "it starts at 0 if a falling density pruned it; otherwise it is kept (GraNet)",
}
INITIAL = {
    "random": "drawn at random, in each layer as many as the distribution gives it",
    "magnitude": "one ranking over all layers by |w|",
    "snip": "one ranking over all layers by |w · gradient| of the first batch (SNIP)",
    "grasp": "one ranking over all layers by w · (Hessian · gradient) of the first batch (GraSP)",
    "synflow": "one ranking over all layers by synaptic flow, in 100 rounds, without data (SynFlow)",
}
DENSITY_SCHEDULES = {
    "cubic": "from initial_density to the density with a cubic curve (GMP, GraNet)",
    "alternating": "initial_density and the density in turn, one update interval each (AC/DC)",
}
_N_M = re.compile(r"([1-9]\d*):([1-9]\d*)")
_BLOCK = re.compile(r"block ([1-9]\d*)x([1-9]\d*)")


def parse_structure(text: str) -> tuple[str, int, int]:
    """Parse a structure into (kind, N or height, M or width).

    Args:
        text: ``none``, ``fan_in`` (the same number of inputs to every output), ``2:4`` (N of M)
            or ``block 4x4``.

    Raises:
        ValueError: ``text`` is anything else.
    """
    if text in ("none", "fan_in"):
        return text, 0, 0
    for kind, pattern in (("n:m", _N_M), ("block", _BLOCK)):
        if match := pattern.fullmatch(text):
            first, second = int(match[1]), int(match[2])
            if kind == "n:m" and first > second:
                raise ValueError(
                    f"{text!r} would keep {first} of every {second} weights; expected a pattern such as 2:4"
                )
            return kind, first, second
    raise ValueError(f"{text!r} is not one of 'none', 'fan_in', 'N:M' such as '2:4', 'block HxW' such as 'block 4x4'")


def contradictions(strategy: Strategy, density: float) -> Iterator[str]:
    """``field: what cannot be`` for every field of a strategy that does not go with the others, or with the density."""
    try:
        kind, kept, group = parse_structure(strategy.structure)
    except ValueError as error:
        yield f"structure: {error}"
        return
    if strategy.initial != "random" and kind != "none":
        yield (
            f"initial: {strategy.initial!r} ranks single weights, which structure {strategy.structure!r} does not "
            "support; use 'random'"
        )
    if not 0 <= strategy.min_salient <= 1:
        yield f"min_salient: expected 0 to 1, got {strategy.min_salient}"
    elif strategy.min_salient and kind != "fan_in":
        yield (
            f"min_salient: {strategy.min_salient:g} lets outputs die, which structure {strategy.structure!r} does not "
            "support; use structure 'fan_in', or min_salient 0"
        )
    if kind == "none":
        return
    if strategy.scope not in ("layer", "global_prune"):
        yield (
            f"scope: {strategy.scope!r} ranks growth over all layers, which structure {strategy.structure!r} does not "
            "support; use 'layer'"
        )
    if strategy.initial_density is not None:
        yield f"initial_density: structure {strategy.structure!r} has one density"
    if kind == "n:m" and (density != kept / group or strategy.distribution != "uniform"):
        yield f"density: structure {strategy.structure!r} means density {kept / group:g} and distribution 'uniform'"
    if kind == "block" and strategy.prune != "magnitude" and strategy.grow is not None:
        yield f"prune: blocks are pruned by their mean magnitude, not by {strategy.prune!r}"
