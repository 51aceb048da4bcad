"""The tables of the study as Markdown: every cell with its intervals, every claim with its verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from benchmarks.support.study_cells import CELLS, NUM_SEEDS
from benchmarks.support.study_claims import (
    BEST,
    HIGHER_IS_BETTER,
    Contrast,
    Verdict,
    beside,
    contrasts,
    difference_of,
    judge,
    values_of,
)
from benchmarks.support.study_evaluations import EVALUATIONS, WITHOUT
from benchmarks.support.study_results import AUROC, METRICS, TICKETS, CellResult
from pipeline.errors import ConfigError
from pipeline.evaluation.paired import CONFIDENCE, Difference, critical_t, mean_of, paired_difference
from pipeline.superposition.rules import RULES

UNITS = {  # metric -> heading, factor, decimals
    "top1": ("top-1 %", 100, 2),
    "nll": ("NLL", 1, 4),
    "ece": ("ECE %", 100, 2),
    AUROC: ("AUROC %", 100, 2),
}
PAPERS = ("ITOP", "FreeTickets", "Sup-tickets")
Load = Callable[[str], CellResult | None]


def tables(load: Load) -> dict[str, str]:
    """Return all tables by the name of their markers, see `fill_in`."""
    return {
        "claims": claims_table(load, num_seeds=NUM_SEEDS),
        "beside": beside_table(load),
        "rules": rules_table(load),
        "disagreement": disagreement_table(load),
        "cells": cells_table(load),
        **{f"verdicts of {paper}": verdicts_table(load, paper, num_seeds=NUM_SEEDS) for paper in PAPERS},
    }


def cells_table(load: Load) -> str:
    """Return one line for every network of every cell: means over seeds with 95% intervals, R_s and FLOPs."""
    heads = ["cell", "network", "seeds", *(UNITS[metric][0] for metric in METRICS), "R_s", "train ×", "test ×"]
    lines = []
    for cell in CELLS.values():
        result = load(cell.name)
        if result is None:
            lines.append([f"`{cell.name}`", "not yet run", f"0 of {len(cell.seeds)}", *[""] * 6])
            continue
        for row in next(iter(result.rows.values())):
            name = str(row["name"])
            values = [
                interval(list(result.values(name, metric).values()), metric) if metric in row else ""
                for metric in METRICS
            ]
            costs = [_mean_cost(result, name, key) for key in ("r_s", "training_flops_ratio", "inference_flops_ratio")]
            num = f"{len(result.rows)} of {len(cell.seeds)}"
            lines.append([f"`{cell.name}`", name, num, *values, *costs])
    return _markdown(heads, lines)


def claims_table(load: Load, *, num_seeds: int) -> str:
    """Return one line for every registered contrast, with its paired difference and verdict."""
    heads = ["paper", "claim", "where", "metric", "pairs", "difference, 95% interval", "verdict"]
    lines = [_claim(each, judge(each, load, num_seeds=num_seeds)) for each in contrasts()]
    return _markdown(heads, lines)


def verdicts_table(load: Load, paper: str, *, num_seeds: int) -> str:
    """Return the primary contrasts of one paper, with difference and verdict."""
    chosen = [each for each in contrasts() if each.paper == paper and each.is_primary]
    lines = [_claim(each, judge(each, load, num_seeds=num_seeds)) for each in chosen]
    heads = ["claim", "metric", "difference, 95% interval", "verdict"]
    return _markdown(heads, [[claim.strip("*"), metric, found, word] for _, claim, _, metric, _, found, word in lines])


def beside_table(load: Load) -> str:
    """Return one line for every difference that is reported and decides nothing."""
    heads = ["about", "difference", "metric", "pairs", "mean, 95% interval"]
    lines = []
    for each in beside():
        found = difference_of(each, load)
        shown = "not yet run" if found is None else _difference(found, each.metric)
        pairs = str(found.num_pairs if found is not None else 0)
        lines.append([each.paper, each.claim, UNITS[each.metric][0], pairs, shown])
    return _markdown(heads, lines)


def rules_table(load: Load) -> str:
    """Return one line for every superposition rule on the tickets of every cell that is superposed."""
    heads = ["tickets of", "rule", "seeds", "top-1 %", "− best ticket", "− without recalibration"]
    lines = []
    for each in (each for each in EVALUATIONS.values() if each.how == "rules"):
        result, cell = load(each.name), load(each.cell.name)
        for rule in RULES:
            line = [f"`{each.cell.name}`", f"`{rule}`"]
            if result is None or cell is None:
                lines.append([*line, "0", "not yet run", "", ""])
                continue
            values, without = (result.values(f"superposition-{rule}{end}", "top1") for end in ("", WITHOUT))
            shown = [interval(list(values.values()), "top1")]
            for other in (values_of(cell, BEST, "top1"), without):
                found = paired_difference(values, other)
                shown.append(_difference(found, "top1") if found is not None else "")
            lines.append([*line, str(len(values)), *shown])
    return _markdown(heads, lines)


def disagreement_table(load: Load) -> str:
    """Return on which share of the test images two members of an ensemble predict different classes."""
    heads = ["members", "ensembles", "predict different classes, % of images"]
    lines = []
    for name in ("fashion_mnist/0.1/edst", "fashion_mnist/0.1/sup_rigl", "emoji/0.1/edst", "fashion_mnist/0.02/edst"):
        result = load(name)
        lines.append([f"`{name}`: four tickets of a run", *_shares(result.disagreement() if result else {})])
    for each in (each for each in EVALUATIONS.values() if each.how == "pairs"):
        result = load(each.cell.name)
        found = {k: disagreement_of(result, seeds) for k, seeds in each.seeds.items()} if result else {}
        line = f"`{each.cell.name}`: two runs"
        lines.append([line, *_shares({k: share for k, share in found.items() if share is not None})])
    return _markdown(heads, lines)


def disagreement_of(result: CellResult, seeds: Sequence[int]) -> float | None:
    """Return on which share of the images the last tickets of two seeds differ; None if a seed is missing."""
    positions = [list(result.rows).index(seed) for seed in seeds if seed in result.rows]
    if len(positions) != 2:
        return None
    last = [index for index, row in enumerate(next(iter(result.rows.values()))) if row["kind"] in TICKETS][-1]
    one, other = (result.top1[position, last] for position in positions)
    return float((one != other).mean())


def _shares(found: Mapping[int, float]) -> tuple[str, str]:
    return str(len(found)), interval(list(found.values()), "top1") if found else "not yet run"


def mean_and_half(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of values over seeds and the half width of its 95% interval; None with one value."""
    found = mean_of(values)
    if found.standard_error is None:
        return found.mean, None
    return found.mean, critical_t(CONFIDENCE, found.num_values - 1) * found.standard_error


def interval(values: Sequence[float], metric: str) -> str:
    """Format the mean of values over seeds with the half width of its 95% interval."""
    _, factor, decimals = UNITS[metric]
    mean, half = mean_and_half(values)
    end = "" if half is None else f" ± {factor * half:.{decimals}f}"
    return f"{factor * mean:.{decimals}f}{end}"


def _claim(contrast: Contrast, verdict: Verdict) -> list[str]:
    heading = UNITS[contrast.metric][0]
    data, density, _ = contrast.better[0].split("/")
    where = f"{data}, density {density}"
    claim = f"**{contrast.claim}**" if contrast.is_primary else contrast.claim
    if verdict.difference is None:
        return [contrast.paper, claim, where, heading, "0", "", verdict.word]
    text = _difference(verdict.difference, contrast.metric)
    word = verdict.word + (f" (about {verdict.num_seeds_needed} seeds)" if verdict.num_seeds_needed else "")
    return [contrast.paper, claim, where, heading, str(verdict.difference.num_pairs), text, word]


def _difference(difference: Difference, metric: str) -> str:
    """Format a difference that is positive where the first network is better as what it is: first − second."""
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    _, factor, decimals = UNITS[metric]
    ends = [each for each in (difference.low, difference.high) if each is not None]
    shown = [f"{sign * factor * each:+.{decimals}f}" for each in (difference.mean, *ends[::sign])]
    return shown[0] + (f" [{', '.join(shown[1:])}]" if ends else "")


def _mean_cost(result: CellResult, row: str, key: str) -> str:
    values = [each for each in result.values(row, key).values() if each is not None]
    return f"{math.fsum(values) / len(values):.3f}" if values else "–"


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def fill_in(text: str, tables: Mapping[str, str]) -> str:
    """Put tables between the lines ``<!-- NAME -->`` and ``<!-- end of NAME -->`` of a document, where it has these."""
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        before, is_there, rest = text.partition(start)
        if not is_there:
            continue
        _, found, after = rest.partition(end)
        if not found:
            raise ConfigError(f"the document has no line {end.strip()} after {start.strip()}", do="add it")
        text = f"{before}{start}{table}{end}{after}"
    return text
