"""The tables of the study as Markdown: every cell with its intervals, every claim with its verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from benchmarks.support.study_cells import CELLS
from benchmarks.support.study_claims import HIGHER_IS_BETTER, Contrast, Verdict, contrasts, judge
from benchmarks.support.study_results import METRICS, CellResult
from pipeline.errors import ConfigError
from pipeline.evaluation.paired import CONFIDENCE, critical_t, mean_of

UNITS = {"top1": ("top-1 %", 100, 2), "nll": ("NLL", 1, 4), "ece": ("ECE %", 100, 2)}  # heading, factor, decimals
Load = Callable[[str], CellResult | None]


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
            values = [interval(list(result.values(name, metric).values()), metric) for metric in METRICS]
            costs = [_mean_cost(result, name, key) for key in ("r_s", "training_flops_ratio", "inference_flops_ratio")]
            num = f"{len(result.rows)} of {len(cell.seeds)}"
            lines.append([f"`{cell.name}`", name, num, *values, *costs])
    return _markdown(heads, lines)


def claims_table(load: Load, *, num_seeds: int) -> str:
    """Return one line for every registered contrast, with its paired difference and verdict."""
    heads = ["paper", "claim", "where", "metric", "pairs", "difference, 95% interval", "verdict"]
    lines = [_claim(each, judge(each, load, num_seeds=num_seeds)) for each in contrasts()]
    return _markdown(heads, lines)


def interval(values: Sequence[float], metric: str) -> str:
    """Format the mean of values over seeds with the half width of its 95% interval."""
    _, factor, decimals = UNITS[metric]
    found = mean_of(values)
    if found.standard_error is None:
        return f"{factor * found.mean:.{decimals}f}"
    half = critical_t(CONFIDENCE, found.num_values - 1) * found.standard_error
    return f"{factor * found.mean:.{decimals}f} ± {factor * half:.{decimals}f}"


def _claim(contrast: Contrast, verdict: Verdict) -> list[str]:
    heading, factor, decimals = UNITS[contrast.metric]
    data, density, _ = contrast.better[0].split("/")
    where = f"{data}, density {density}"
    claim = f"**{contrast.claim}**" if contrast.is_primary else contrast.claim
    if verdict.difference is None:
        return [contrast.paper, claim, where, heading, "0", "", verdict.word]
    sign = 1 if HIGHER_IS_BETTER[contrast.metric] else -1  # back from "positive where the claim is right"
    ends = [each for each in (verdict.difference.low, verdict.difference.high) if each is not None]
    shown = [f"{sign * factor * each:+.{decimals}f}" for each in (verdict.difference.mean, *ends[::sign])]
    text = shown[0] + (f" [{', '.join(shown[1:])}]" if ends else "")
    word = verdict.word + (f" (about {verdict.num_seeds_needed} seeds)" if verdict.num_seeds_needed else "")
    return [contrast.paper, claim, where, heading, str(verdict.difference.num_pairs), text, word]


def _mean_cost(result: CellResult, row: str, key: str) -> str:
    values = [each for each in result.values(row, key).values() if each is not None]
    return f"{math.fsum(values) / len(values):.3f}" if values else "–"


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def fill_in(text: str, tables: Mapping[str, str]) -> str:
    """Put each table between its markers, the lines ``<!-- NAME -->`` and ``<!-- end of NAME -->``, in a document."""
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise ConfigError(f"the document has no lines {start.strip()} and {end.strip()}", do="add them")
        text = f"{before}{start}{table}{end}{after}"
    return text
