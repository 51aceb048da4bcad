"""The metrics by which whole runs are compared, from the metrics of their tickets, superposition and ensembles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

METRICS = ("top1", "nll", "ece")


class Judged(NamedTuple):
    """One network or ensemble, with its metrics by name."""

    kind: str  # ticket, dense, superposition or ensemble
    num_members: int
    metrics: Mapping[str, float]


def final_metrics(rows: Sequence[Judged]) -> dict[str, float]:
    """Return what a run is compared by, as ``eval/<network>_<metric>``.

    The networks are the last ticket, the ticket with the highest top-1, the superposition (the first, if
    there are several) and the largest ensemble. The best ticket is chosen on the very images that it is
    reported on, so its accuracy is optimistic. Where there are no tickets but dense references, these are
    taken instead.
    """
    tickets, superpositions, ensembles, references = (
        [row for row in rows if row.kind == kind] for kind in ("ticket", "superposition", "ensemble", "dense")
    )
    tickets = tickets or references
    chosen = {
        "last_ticket": tickets[-1:],
        "best_ticket": sorted(tickets, key=lambda row: -row.metrics["top1"])[:1],
        "superposition": superpositions[:1],
        "ensemble": sorted(ensembles, key=lambda row: -row.num_members)[:1],
    }
    return {
        f"eval/{name}_{key}": row.metrics[key] for name, found in chosen.items() for row in found for key in METRICS
    }


def missing_final_metrics(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the final metrics that a journal of version 0.1 lacks, from its children; empty if it has them."""
    children: dict[str, Judged] = {}
    for record in records:
        if "step" in record and any(key.startswith("eval/") for key in record["metrics"]):
            return {}
        if "child" in record and "kind" in record["params"]:
            metrics = {key.removeprefix("eval/"): float(value) for key, value in record["metrics"].items()}
            if set(METRICS) <= metrics.keys():
                num_members = int(record["params"].get("num_members", 1))
                children[record["child"]] = Judged(record["params"]["kind"], num_members, metrics)
    return final_metrics(list(children.values()))
