"""The registered contrasts of the study and the rule for their verdicts. docs/study-plan.md says why these."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.support.study_cells import EMOJI, FASHION, INTERVALS, MAIN_DENSITY, OTHER_DENSITIES, interval_cell
from benchmarks.support.study_results import AUROC, METRICS, TICKETS, CellResult
from pipeline.evaluation.paired import CONFIDENCE, Difference, critical_t, paired_difference

# The smallest difference worth having; of top-1 and ECE as fractions, of NLL in nats.
WORTH = {"top1": 0.005, "nll": 0.02, "ece": 0.01}
HIGHER_IS_BETTER = {"top1": True, "nll": False, "ece": False, AUROC: True}
LAST, BEST = "last ticket", "best ticket"  # rows that every cell has; others are named as in reports


@dataclass(frozen=True)
class Contrast:
    """One network against another, seed by seed."""

    paper: str
    claim: str
    better: tuple[str, str]  # cell and row that the claim says is better
    other: tuple[str, str]
    metric: str = "top1"
    is_no_worse: bool = False  # the claim is only that the first is not worse by what is worth having
    is_primary: bool = False  # decides the claim; the others say where else it holds


@dataclass(frozen=True)
class Verdict:
    """What the runs say about a contrast. Differences are positive where the claim is right."""

    word: str  # reproduced, not reproduced, not decidable, or not yet run
    difference: Difference | None
    num_seeds_needed: int | None = None  # of a contrast that is not decidable, by the measured deviation


def contrasts() -> list[Contrast]:
    """Return all registered contrasts, by place: the main one, the other data set, the other densities."""
    places = [(FASHION, MAIN_DENSITY), (EMOJI, MAIN_DENSITY), *((FASHION, density) for density in OTHER_DENSITIES)]
    found = []
    for data, density in places:
        here, is_main = f"{data}/{density:g}", (data, density) == places[0]
        found += [replace(each, is_primary=is_main) for each in _claims(here, dense=f"{data}/1/dense")]
        found += _exploration(here) if is_main else []
    return found


def _claims(here: str, *, dense: str) -> list[Contrast]:
    """Return the contrasts of one data set and density."""
    best_run, reference = (f"{here}/rigl_itop", LAST), (dense, LAST)
    rigl, sets, static = ((f"{here}/{what}", LAST) for what in ("rigl", "set", "static"))
    ensemble, superposed = (f"{here}/edst", "ensemble-4"), (f"{here}/sup_rigl", "superposition-mean")
    return [
        Contrast("ITOP", "RigL-ITOP is better than a static mask", best_run, static),
        Contrast("ITOP", "RigL-ITOP is no worse than RigL", best_run, rigl, is_no_worse=True),
        Contrast("ITOP", "RigL is no worse than SET", rigl, sets, is_no_worse=True),
        Contrast("ITOP", "SET is no worse than a static mask", sets, static, is_no_worse=True),
        Contrast("ITOP", "RigL-ITOP closes the gap to dense", best_run, reference, is_no_worse=True),
        *(
            Contrast("FreeTickets", "the EDST ensemble of 4 is better than dense", ensemble, reference, metric=metric)
            for metric in WORTH
        ),
        Contrast("FreeTickets", "the EDST ensemble of 4 beats one run of the same FLOPs", ensemble, best_run),
        Contrast("Sup-tickets", "the superposition beats the best cheap ticket", superposed, (superposed[0], BEST)),
        Contrast("Sup-tickets", "the superposition beats one run of the same FLOPs", superposed, best_run),
    ]


def _exploration(here: str) -> list[Contrast]:
    """Return the contrasts between the ends of the sweep of ΔT."""
    few, many = max(INTERVALS), min(INTERVALS)
    found = []
    for method, name in (("set_itop", "SET-ITOP"), ("rigl_itop", "RigL-ITOP")):
        much, little = ((f"{here}/{interval_cell(method, each)}", LAST) for each in (many, few))
        claim = f"{name}: the highest R_s (ΔT {many}) beats the lowest (ΔT {few})"
        found.append(Contrast("ITOP", claim, much, little, is_primary=True))
    return found


def beside() -> list[Contrast]:
    """Return the differences that are reported beside the contrasts and decide nothing, all at the main place.

    ``paper`` is what they are about. Ensemble k of two runs, of seeds 2k and 2k + 1, is paired with seed k.
    """
    here, dense = f"{FASHION}/{MAIN_DENSITY:g}", f"{FASHION}/1/dense"
    run, half = (f"{here}/rigl_itop", LAST), f"{FASHION}/0.5/rigl_itop"
    two = "ensemble-2"
    found = [
        *(
            ("corrupted images", "EDST ensemble of 4 − dense", (f"{here}/edst+corrupted", "ensemble-4"), metric)
            for metric in METRICS
        ),
        ("other images", "EDST ensemble of 4 − dense", (f"{here}/edst+other", "ensemble-4"), AUROC),
    ]
    others = {"corrupted images": (f"{dense}+corrupted", LAST), "other images": (f"{dense}+other", LAST)}
    further = [Contrast(what, claim, one, others[what], metric=metric) for what, claim, one, metric in found]
    pairs = [
        ("training FLOPs of T", "two runs of T/2 (DST ensemble) − one run", (f"{here}/dst_half+pairs", two), run),
        ("training FLOPs of T", "EDST ensemble of 2 − one run", (f"{here}/edst", two), run),
        ("training FLOPs of T", "EDST ensemble of 3 − one run", (f"{here}/edst", "ensemble-3"), run),
        ("training FLOPs of T", "moving average of the weights − one run", (f"{here}/rigl_itop_ema", LAST), run),
        ("training FLOPs of T", "GraNet − RigL-ITOP", (f"{here}/granet", LAST), run),
        ("training FLOPs of T", "RigL-ITOP − dense for 0.15 T", run, (f"{dense}_short", LAST)),
        ("training FLOPs of T, dense", "two runs of T/2 − one run", (f"{dense}_half+pairs", two), (dense, LAST)),
        ("training FLOPs of 2 T", "one run of 2 T − one run of T", (f"{here}/rigl_itop_2x", LAST), run),
        (
            "training FLOPs of 2 T",
            "two runs of T − one run of 2 T",
            (f"{here}/rigl_itop+pairs", two),
            (f"{here}/rigl_itop_2x", LAST),
        ),
        ("density of layers", "uniform − ERK", (f"{here}/uniform", LAST), run),
        ("structure", "fan_in − none", (f"{here}/fan_in", LAST), run),
        ("structure", "block 4x1 − none", (f"{here}/block_4x1", LAST), run),
        ("structure", "2:4 − none, density 0.5", (f"{FASHION}/0.5/2_of_4", LAST), (half, LAST)),
        (
            "structure, ensembles of two",
            "fan_in − none",
            (f"{here}/fan_in+pairs", two),
            (f"{here}/rigl_itop+pairs", two),
        ),
        (
            "structure, ensembles of two",
            "block 4x1 − none",
            (f"{here}/block_4x1+pairs", two),
            (f"{here}/rigl_itop+pairs", two),
        ),
        (
            "structure, ensembles of two",
            "2:4 − none, density 0.5",
            (f"{FASHION}/0.5/2_of_4+pairs", two),
            (f"{half}+pairs", two),
        ),
    ]
    return further + [Contrast(what, claim, one, other) for what, claim, one, other in pairs]


def values_of(cell: CellResult, row: str, metric: str) -> dict[int, float]:
    """Return a metric by seed; ``LAST`` and ``BEST`` choose among the tickets, BEST by top-1 on the test set itself.

    Choosing on the test set favours the ticket, never what is compared with it.
    """
    if row not in (LAST, BEST):
        return cell.values(row, metric)
    found = {}
    for seed, rows in cell.rows.items():
        tickets = [each for each in rows if each["kind"] in TICKETS]
        chosen = tickets[-1] if row == LAST else max(tickets, key=lambda each: each["top1"])
        found[seed] = float(chosen[metric])
    return found


def judge(contrast: Contrast, load: Callable[[str], CellResult | None], *, num_seeds: int) -> Verdict:
    """Judge a contrast by the finished runs.

    Args:
        contrast: what is compared.
        load: gives the result of a cell; None if it has none yet.
        num_seeds: registered seeds; with fewer pairs nothing is called decided.
    """
    difference = difference_of(contrast, load)
    if difference is None or difference.num_pairs < num_seeds:
        return Verdict("not yet run", difference)
    return Verdict(*verdict_of(difference, worth=WORTH[contrast.metric], is_no_worse=contrast.is_no_worse))


def difference_of(contrast: Contrast, load: Callable[[str], CellResult | None]) -> Difference | None:
    """Return the paired difference of a contrast, positive where the claim is right; None if a cell has no result."""
    sign = 1 if HIGHER_IS_BETTER[contrast.metric] else -1
    values = []
    for name, row in (contrast.better, contrast.other):
        if (cell := load(name)) is None:
            return None
        values.append({seed: sign * value for seed, value in values_of(cell, row, contrast.metric).items()})
    return paired_difference(*values)


def verdict_of(
    difference: Difference, *, worth: float, is_no_worse: bool = False
) -> tuple[str, Difference, int | None]:
    """Apply the plan's rule to an interval of differences, positive where the claim is right.

    Returns:
        The word, the difference, and the number of seeds that would decide, where these did not.
    """
    assert difference.low is not None and difference.high is not None
    least = -worth if is_no_worse else 0.0  # what the claim says is exceeded
    enough = 0.0 if is_no_worse else worth  # what the claim fails without
    if difference.low > least:
        return "reproduced", difference, None
    if difference.high < enough:
        return "not reproduced", difference, None
    return "not decidable", difference, seeds_needed(difference, least=least, enough=enough)


def seeds_needed(difference: Difference, *, least: float, enough: float) -> int:
    """Return the number of seeds with which an interval of this mean and deviation would decide.

    The interval's half width is t·s/√n; it has to be less than the larger distance of the mean from
    the two bounds of the rule.
    """
    assert difference.high is not None
    n = difference.num_pairs
    deviation = (difference.high - difference.mean) * math.sqrt(n) / critical_t(CONFIDENCE, n - 1)
    distance = max(difference.mean - least, enough - difference.mean)
    needed = n
    while critical_t(CONFIDENCE, needed - 1) * deviation / math.sqrt(needed) >= distance:
        needed += 1 + needed // 20
    return needed
