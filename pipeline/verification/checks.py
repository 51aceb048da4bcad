"""Check that all that a run left agrees with its chain and with itself, without running anything again.

Each function raises IntegrityError for the first claim that does not agree. Does not need torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.chain import END
from pipeline.checkpoint.verify import digests_of, find_damage, read_state
from pipeline.config.load import config_digest, differences
from pipeline.config.schema import KEYS
from pipeline.evaluation.predictions import FILE_NAME, load_predictions
from pipeline.files import parse_json, read_capped, why_malformed
from pipeline.tickets.verify import digest_without_run, read_verified
from pipeline.tracking import final
from pipeline.tracking.journal import read_records
from pipeline.tracking.tracker import flatten_params
from pipeline.training.chained import LAYERS, files_of_report, is_chained, layers_digest, settings_of
from pipeline.verification.claims import BEST, Claims, as_values, first_difference

MAX_REPORT_BYTES = 1 << 28
NLL_TOLERANCE = 1e-5  # relative: predictions hold NLLs as float32, the report means as float64


def check_all(claims: Claims) -> None:
    """Make all checks of this file.

    Raises:
        IntegrityError: something does not agree; the message names it.
        DataError, WriteError, PermissionDenied: a file is missing or cannot be read.
    """
    check_config(claims)
    check_tickets(claims)
    check_checkpoints(claims)
    check_report(claims)
    check_journal(claims)


def check_config(claims: Claims) -> None:
    """Check ``config.yaml`` against the first record."""
    start = claims.start
    claims.require(
        "config.yaml: digest of what decides the training", config_digest(claims.config), start["config_digest"]
    )
    if claims.is_whole:
        found, expected = settings_of(as_values(claims.config)), start["settings"]
        if (key := first_difference(found, expected)) is not None:
            claims.require(f"config.yaml: {key}", found.get(key), expected.get(key))
    else:
        claims.notes.append(f"the chain starts at step {start['step']}: nothing before is covered")


# -- metrics.jsonl


def check_journal(claims: Claims) -> None:
    """Check ``metrics.jsonl``: the order of its steps, every chained metric, parameters, data sets and tickets."""
    path = claims.folder / "metrics.jsonl"
    if not path.exists():
        if claims.config.tracking.backend != "none":
            raise claims.wrong("metrics.jsonl is missing")
        claims.notes.append("there is no metrics.jsonl (tracking.backend: none)")
        return
    journal = _Journal(claims)
    for record in read_records(claims.folder):
        journal.read(record)
    expected = claims.metrics
    open_from = math.inf if claims.is_ended else claims.reported_until - 1
    found = {
        at: value
        for at, value in journal.values.items()
        if at[0] >= claims.start["step"] - 1 and (at in expected or at[0] < open_from)
    }
    if not claims.is_whole:  # the evaluation before the first step of the chain may belong to either side
        found = {at: value for at, value in found.items() if at in expected or at[0] >= claims.start["step"]}
    if (at := first_difference(found, expected)) is not None:
        claims.require(f"metrics.jsonl: step {at[0]}: {at[1]}", found.get(at), expected.get(at))
    if claims.is_whole:
        stated = flatten_params(as_values(claims.config) | {"ranks": claims.start["ranks"], "run_id": claims.run_id})
        for key, value in stated.items():
            is_newer = key not in journal.params and key in KEYS and value == str(KEYS[key].default)  # than the run
            if not is_newer:
                claims.require(f"metrics.jsonl: parameter {key}", journal.params.get(key), value, by="config.yaml")
    data = claims.start_at(len(claims.records))["data"]
    is_random = claims.config.data.order == "random"  # the digest of another order covers more than the images
    uses = {"evaluation": "val", "held-out": "held_out"} | ({"training": "train"} if is_random else {})
    for context, digest in journal.inputs.items():
        if context in uses:
            claims.require(f"metrics.jsonl: digest of the {context} set", digest, data[uses[context]])
    if claims.is_ended:
        _check_children(claims, journal)


class _Journal:
    """What a journal says in the end; steps that were computed twice count once."""

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self._is_new = False  # whether a process has started, and has not said yet from which step
        self._forget()

    def _forget(self) -> None:
        self.values: dict[tuple[int, str], Any] = {}
        self.finals: dict[str, Any] = {}
        self.params: dict[str, str] = {}
        self.inputs: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.children: dict[str, dict[str, Any]] = {}
        self._step = -1

    def read(self, record: Mapping[str, Any]) -> None:
        if "resumed_from_step" in record:
            first, self._is_new = int(record["resumed_from_step"]), False
            self.values = {at: value for at, value in self.values.items() if at[0] < first}
            self._step = first - 1
            return
        if self._is_new:  # it started at step 0
            self._forget()
        self._is_new = "run" in record
        if "layers" in record:
            self._note(int(record["after_step"]), {LAYERS: layers_digest(record["layers"])})
        elif "step" in record:
            values = record["metrics"]
            self._note(int(record["step"]), {key: value for key, value in values.items() if is_chained(key)})
            self.finals |= {key: value for key, value in values.items() if key.startswith("eval/")}
        elif "child" in record:
            self.children[record["child"]] = {"metrics": record["metrics"], "params": record["params"]}
        elif "params" in record:
            self.params = {**record["params"], **self.params}
        elif "input" in record:
            self.inputs.setdefault(record["context"], record["digest"])
        elif "tags" in record:
            self.tags |= record["tags"]

    def _note(self, step: int, values: Mapping[str, Any]) -> None:
        if not values:
            return
        if step < self._step:
            raise self._claims.wrong(f"metrics.jsonl: step {step} comes after step {self._step}")
        self._step = step
        self.values |= {(step, key): value for key, value in values.items()}


def _check_children(claims: Claims, journal: _Journal) -> None:
    """Check the results that the journal repeats from the report."""
    rows, of_run = _rows(claims), _report_of(claims)["run"]
    for row in rows:
        numbers = {**row, **row["more"]}
        reported = journal.children.get(row["name"])
        if reported is None:
            raise claims.wrong(f"metrics.jsonl: the result of {row['name']} is missing")
        params = flatten_params({**of_run, **{key: row[key] for key in ("name", "kind", "num_members")}})
        claims.require(f"metrics.jsonl: {row['name']}", reported["params"], params, by="report.json")
        for key, value in reported["metrics"].items():
            expected = numbers.get(key.removeprefix("eval/"))
            claims.require(f"metrics.jsonl: {row['name']}: {key}", value, expected, by="report.json")
    if odd := sorted(journal.children.keys() - {row["name"] for row in rows}):
        raise claims.wrong(f"metrics.jsonl: {odd[0]} is not in report.json")
    judged = [
        final.Judged(row["kind"], row["num_members"], {**row, **row["more"]}) for row in rows if not row["is_apart"]
    ]
    finals = final.final_metrics(judged)
    if (of := first_difference(journal.finals, finals)) is not None:
        claims.require(f"metrics.jsonl: {of}", journal.finals.get(of), finals.get(of), by="report.json")
    kind = "dense" if claims.config.sparsity.method == "dense" else "ticket"
    for path, _, _ in claims.ticket_files():
        tag = f"{'best-' * (path.parent.name == BEST)}{kind}-{int(path.stem[-3:])}"
        if tag in journal.tags and path.exists():
            stated, content = journal.tags[tag].rpartition(" ")[2], read_verified(path).content_digest
            claims.require(f"metrics.jsonl: sha256 of {path.name}", stated, content, by=path.name)


# -- tickets, checkpoints, report


def check_tickets(claims: Claims) -> None:
    """Check that every ticket of the chain is there as it was made, and no other."""
    seen = set()
    newest_checkpoint = max(claims.checkpoints, default=0)
    of_run = list(claims.ticket_files())
    newest = max((int(path.stem[-3:]) for path, _, _ in of_run), default=0)
    for path, digest, record in of_run:
        seen.add(path)
        if not path.exists():
            is_retired = not claims.retention.keeps(int(path.stem[-3:]), newest)
            is_unwritten = not claims.is_ended and record["step"] > newest_checkpoint
            if is_retired or is_unwritten:
                continue
            raise claims.wrong(f"{path.relative_to(claims.folder)} is missing")
        ticket = read_verified(path)
        what = str(path.relative_to(claims.folder))
        claims.require(f"{what}: content", digest_without_run(ticket), digest)
        claims.require(f"{what}: parent_run", ticket.provenance.parent_run, claims.run_id, by="run.json")
        claims.require(f"{what}: index", ticket.provenance.index, int(path.stem[-3:]), by="its name")
        claims.require(f"{what}: config_digest", ticket.provenance.config_digest, _last_start(claims, record))
    for folder in dict.fromkeys(claims.ticket_folder(kind) for kind in ("last", "best")):
        for path in sorted(folder.glob("*.safetensors")):
            if path not in seen and not _is_outside_chain(claims, path):
                raise claims.wrong(f"{path.relative_to(claims.folder)} is not in the chain")


def _last_start(claims: Claims, record: Mapping[str, Any]) -> str:
    return str(claims.start_at(claims.records.index(dict(record)) + 1)["config_digest"])


def _is_outside_chain(claims: Claims, path: Path) -> bool:
    """Return whether a ticket is from before the chain, or from after the last record of a run that has not ended."""
    step = read_verified(path).provenance.step
    return (not claims.is_whole and step <= claims.start["step"]) or (not claims.is_ended and step >= claims.last_step)


def check_checkpoints(claims: Claims) -> None:
    """Check the hashes of every checkpoint, its place in the chain, and its state against the chain's record of it."""
    records = claims.checkpoint_records()
    for step, folder in claims.checkpoints.items():
        what = f"checkpoints/{folder.name}"
        if reason := find_damage(folder):
            raise claims.wrong(f"{what}: {reason}")
        state = read_state(folder)
        expected: dict[str, Any] = {"step": step, "samples_seen": step * claims.config.train.global_batch}
        position = state["chain"]
        if not position and step <= claims.start["step"]:
            continue  # from before the chain
        number = int(position.get("num_records", -1))
        if not 0 < number <= len(claims.records) or claims.records[number - 1]["link"] != position["link"]:
            raise claims.wrong(f"{what}: state.json: is not of this chain")
        start = claims.start_at(number)
        expected |= {"world_size": start["ranks"], "environment": start["environment"]}
        expected |= {"data_digest": start["data"]["train"]}
        for key, value in expected.items():
            claims.require(f"{what}: state.json: {key}", state[key], value)
        if start["config_digest"] == claims.start["config_digest"]:
            changed = differences(state["config"], as_values(claims.config))
            if changed:
                raise claims.wrong(f"{what}: state.json: config: {changed[0]} in config.yaml")
        _check_pending(claims, what, number, position["pending"])
        if step in records:
            of_files = digests_of(folder, state)
            for key, of_what in {"shared": "weights, masks, optimiser", "ranks": "BatchNorm, random numbers"}.items():
                claims.require(f"{what}: {of_what}", of_files[key], records[step][1][key])


def _check_pending(claims: Claims, what: str, number: int, pending: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that the next record has the metrics that waited for it."""
    following = next((record["metrics"] for record in claims.records[number:] if "metrics" in record), None)
    if following is None:
        return
    for step, values in pending.items():
        for key, value in values.items():
            claims.require(f"{what}: state.json: {key} of step {step}", value, following.get(step, {}).get(key))


def check_report(claims: Claims) -> None:
    """Check the files of the report against the last record, and its numbers against the predictions."""
    ends = claims.of_kind(END)
    if not ends:
        claims.notes.append("the run has not ended: there is no report yet")
        return
    report = claims.folder / "report"
    try:
        found = files_of_report(report)
    except FileNotFoundError as error:
        raise claims.wrong(f"report/{Path(error.filename).name} is missing") from None
    expected = ends[0]["files"]
    if (file := first_difference(found, expected)) is not None:
        claims.require(f"report/{file}", found.get(file), expected.get(file))
    if FILE_NAME not in found:
        claims.notes.append("the report has no predictions")
        return
    predictions, rows = load_predictions(report / FILE_NAME), _rows(claims)
    data = claims.start_at(len(claims.records))["data"]
    claims.require("predictions.npz: digest of the test set", predictions.data_digest, data["val"])
    claims.require("predictions.npz: rows", list(predictions.names), [row["name"] for row in rows], by="report.json")
    for number, row in enumerate(rows):
        top1 = float((predictions.top1[number] == predictions.labels).mean())
        nll = float(predictions.nll[number].mean(dtype=np.float64))
        if abs(top1 - row["top1"]) > 1e-9:
            claims.require(f"report.json: top-1 of {row['name']}", row["top1"], top1, by="predictions.npz")
        if abs(nll - row["nll"]) > NLL_TOLERANCE * max(1.0, abs(nll)):
            claims.require(f"report.json: NLL of {row['name']}", row["nll"], nll, by="predictions.npz")


def _rows(claims: Claims) -> list[dict[str, Any]]:
    """Return the rows of the report: one for each ticket, superposition and ensemble."""
    return list(_report_of(claims)["rows"])


def _report_of(claims: Claims) -> dict[str, Any]:
    path = claims.folder / "report" / "report.json"
    needed = {"name", "kind", "top1", "nll", "ece", "num_members", "is_apart", "more"}
    try:
        report = parse_json(read_capped(path, MAX_REPORT_BYTES))
        if not all(needed <= row.keys() for row in report["rows"]) or not isinstance(report["run"], dict):
            raise ValueError("a row lacks a field")
        return dict(report)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise claims.wrong(f"report/report.json: {why_malformed(error)}") from None
