"""The table of a sweep: means over seeds and paired differences, for three networks of each run."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launchers.sweep_jobs import last_error
from launchers.sweep_members import LOG, Record, find_combination
from pipeline.errors import DataError, IntegrityError
from pipeline.evaluation.paired import CONFIDENCE, Difference, Mean, mean_of, paired_difference
from pipeline.evaluation.predictions import FILE_NAME, load_predictions
from pipeline.evaluation.table import aligned
from pipeline.files import cannot_read, parse_json, read_capped, why_malformed
from pipeline.numbers import quantity

# name in the table -> kinds of rows of a report, of which the last one is taken; what is apart in a report (other
# states of the same training) has its label behind the name
NETWORKS = {"last ticket": ("ticket", "dense"), "superposition": ("superposition",), "largest ensemble": ("ensemble",)}
METRICS = {"top1": ("top-1 %", 100, 2), "nll": ("NLL", 1, 4), "ece": ("ECE %", 100, 2)}  # heading, factor, decimals
COSTS = {"r_s": "R_s", "training_flops_ratio": "train ×", "inference_flops_ratio": "test ×"}
MAX_REPORT_BYTES = 1 << 28
FORMATS = {"text": "txt", "markdown": "md", "csv": "csv", "json": "json"}  # -> ending of the file


@dataclass(frozen=True)
class Row:
    """One network of one combination, over its seeds."""

    combination: str
    values: dict[str, str]  # name of the axis -> value
    network: str  # a key of NETWORKS, perhaps with a label
    by_seed: dict[str, dict[int, float]]  # metric or cost -> seed -> value
    means: dict[str, Mean]
    differences: dict[str, Difference]  # of METRICS, from the baseline; empty for the baseline itself


@dataclass(frozen=True)
class Failure:
    """How a member failed."""

    exit_code: int
    log: str
    error: str  # the last line ERROR[…] of the log

    def __str__(self) -> str:
        return f"exit code {self.exit_code}, log {self.log}"


@dataclass(frozen=True)
class Table:
    """All rows, by network and combination, and what is missing."""

    baseline: str
    against: str  # the network of the baseline that all are compared with; empty: each with the same network
    rows: tuple[Row, ...]
    failed: dict[str, Failure]  # by member
    num_missing: int  # members that have not ended


# -- from reports to rows


def collect(record: Record, *, baseline: str = "", against: str = "") -> Table:
    """Read the reports of all members that are done.

    Args:
        record: the sweep.
        baseline: the combination that the others are compared with; empty: the first.
        against: the network of the baseline that all networks are compared with, a key of NETWORKS;
            empty: each is compared with the same network.

    Raises:
        ConfigError: there is no such combination.
        DataError: members were evaluated on different images.
        IntegrityError: a report is damaged.
    """
    combinations = {_combination(name): member["values"] for name, member in record.members.items()}
    first = find_combination(baseline, combinations)
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}  # network, combination -> key -> seed -> value
    digests: dict[str, str] = {}
    for name in filter(record.is_done, record.members):
        report = record.folder / name / "report"
        digests.setdefault(load_predictions(report / FILE_NAME).data_digest, name)
        for network, row in _networks(report / "report.json").items():
            of_row = found.setdefault((network, _combination(name)), {})
            for key in (*METRICS, *COSTS):
                if row[key] is not None:
                    of_row.setdefault(key, {})[record.members[name]["seed"]] = row[key]
    if len(digests) > 1:
        one, other = list(digests.values())[:2]
        raise DataError(
            f"{record.folder}: {one} and {other} were evaluated on different images",
            do="train all runs again with one data.val",
        )
    rows = [
        Row(
            combination,
            combinations[combination],
            network,
            by_seed := found[network, combination],
            {key: mean_of(list(values.values())) for key, values in by_seed.items()},
            _differences(by_seed, found.get((against or network, first), {}))
            if (network, combination) != (against or network, first)
            else {},
        )
        for network in dict.fromkeys([*NETWORKS, *(network for network, _ in found)])
        for combination in combinations
        if (network, combination) in found
    ]
    failed = {
        name: Failure(member["exit_code"], str(log), last_error(log))
        for name, member in record.members.items()
        if member["exit_code"] and (log := record.folder / name / LOG)
    }
    num_done = sum(map(record.is_done, record.members))
    return Table(first, against, tuple(rows), failed, len(record.members) - num_done - len(failed))


def _combination(name: str) -> str:
    return name.rpartition("seed=")[0].rstrip(",")


def _networks(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a report that stand in the table."""
    try:
        rows = parse_json(read_capped(path, MAX_REPORT_BYTES))["rows"]
        return {
            _network(row): {key: None if row[key] is None else float(row[key]) for key in (*METRICS, *COSTS)}
            for row in rows  # of several with one name the last one stays
        }
    except OSError as error:
        raise cannot_read(path, error) from None
    except (ValueError, TypeError, KeyError, StopIteration) as error:
        raise IntegrityError(
            f"{path}: is not a report: {why_malformed(error)}",
            do="remove it and start the sweep again, which writes a new one",
        ) from None


def _network(row: Mapping[str, Any]) -> str:
    """Return the name in the table of a row of a report."""
    network = next(network for network, kinds in NETWORKS.items() if row["kind"] in kinds)
    label = re.match(r"(.+)-(ticket|dense|superposition|ensemble)-", row["name"]) if row.get("is_apart") else None
    return f"{network}, {label[1]}" if label else network


def _differences(
    values: Mapping[str, Mapping[int, float]], baseline: Mapping[str, Mapping[int, float]]
) -> dict[str, Difference]:
    found = {metric: paired_difference(values[metric], baseline.get(metric, {})) for metric in METRICS}
    return {metric: difference for metric, difference in found.items() if difference is not None}


# -- from rows to text


def render(table: Table, kind: str) -> str:
    """Return the table as ``text``, ``markdown``, ``csv`` or ``json``, with a newline at the end."""
    return {"text": _text, "markdown": _markdown, "csv": _csv, "json": _json}[kind](table)


def _cells(table: Table) -> list[tuple[str, list[list[str]]]]:
    """Return heading and cells of every part: for each network the means, then the differences."""
    parts = []
    for network in dict.fromkeys(row.network for row in table.rows):
        rows = [row for row in table.rows if row.network == network]
        axes = list(rows[0].values) or [""]
        heads = [*axes, "seeds", *(heading for heading, _, _ in METRICS.values()), *COSTS.values()]
        means = [
            [*_values(row), str(row.means["top1"].num_values)]
            + [_mean(row.means[key], factor, decimals) for key, (_, factor, decimals) in METRICS.items()]
            + [f"{row.means[key].mean:.3f}" if key in row.means else "–" for key in COSTS]
            for row in rows
        ]
        parts.append((network, [heads, *means]))
        compared = [row for row in rows if row.differences]
        if compared:
            heads = [*axes, "pairs", *(heading for heading, _, _ in METRICS.values())]
            differences = [
                [*_values(row), str(row.differences["top1"].num_pairs)]
                + [
                    _difference(row.differences[key], factor, decimals)
                    for key, (_, factor, decimals) in METRICS.items()
                ]
                for row in compared
            ]
            baseline = ", ".join(filter(None, (table.baseline, table.against)))
            parts.append((f"{network}, difference from {baseline}", [heads, *differences]))
    return parts


def _values(row: Row) -> list[str]:
    return list(row.values.values()) or ["all"]


def _mean(mean: Mean, factor: float, decimals: int) -> str:
    error = "" if mean.standard_error is None else f" ± {factor * mean.standard_error:.{decimals}f}"
    return f"{factor * mean.mean:.{decimals}f}{error}"


def _difference(found: Difference, factor: float, decimals: int) -> str:
    mean, low, high = (
        "" if value is None else f"{factor * value:+.{decimals}f}" for value in (found.mean, found.low, found.high)
    )
    return f"{mean} [{low}, {high}]" if low else mean


def _notes(table: Table) -> list[str]:
    notes = [
        f"± standard error over seeds. Differences: same seeds and test images, [{100 * CONFIDENCE:g}% interval] by "
        "Student's t over seeds,",
        "not corrected for the number of comparisons.",
    ]
    notes += [f"failed: {name}: {why}" + f": {why.error}" * bool(why.error) for name, why in table.failed.items()]
    notes += [f"not done: {quantity(table.num_missing, 'run')}"] * bool(table.num_missing)
    return notes


def _text(table: Table) -> str:
    parts = [
        [heading, *aligned(cells, num_left=len(cells[0]) - _num_numbers(cells))] for heading, cells in _cells(table)
    ]
    return "\n".join(line for part in [*parts, _notes(table)] for line in [*part, ""])


def _num_numbers(cells: Sequence[Sequence[str]]) -> int:
    """Return the number of columns after those of the axes."""
    return len(cells[0]) - next(i for i, head in enumerate(cells[0]) if head in ("seeds", "pairs"))


def _markdown(table: Table) -> str:
    lines = []
    for heading, (heads, *rows) in _cells(table):
        lines += [f"**{heading}**", ""]
        lines += [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows)] + [""]
    return "\n".join([*lines, *_notes(table), ""])


def _csv(table: Table) -> str:
    """One line for each row; fractions, not percent."""
    axes = list(table.rows[0].values) if table.rows else []
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    measured = [f"{key}{end}" for key in (*METRICS, *COSTS) for end in ("", "_standard_error")]
    compared = [f"{key}_difference{end}" for key in METRICS for end in ("", "_low", "_high")]
    writer.writerow([*axes, "network", "seeds", *measured, "pairs", *compared])
    for row in table.rows:
        means = [row.means.get(key) for key in (*METRICS, *COSTS)]
        differences = [row.differences.get(key) for key in METRICS]
        writer.writerow(
            [*row.values.values(), row.network, row.means["top1"].num_values]
            + [value for mean in means for value in ((mean.mean, mean.standard_error) if mean else ("", ""))]
            + [row.differences["top1"].num_pairs if row.differences else ""]
            + [value for each in differences for value in ((each.mean, each.low, each.high) if each else ("", "", ""))]
        )
    return file.getvalue()


def _json(table: Table) -> str:
    return json.dumps(asdict(table) | {"confidence": CONFIDENCE}, indent=1) + "\n"
