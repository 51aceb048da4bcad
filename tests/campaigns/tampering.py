"""Change what a run left so that it no longer agrees with itself: ``python -m tests.campaigns.tampering``.

A small run is trained; 200 times a copy of its folder, or of its bundle, is changed in one of the ways
of ``KINDS``, drawn with a seed, with all hashes that the edit can reach made to agree again. Each
change must be found without running anything again, in one line. Exits with 1 if one is not.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.chain import canonical, link_of
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.errors import DataError, IntegrityError
from pipeline.evaluation.predictions import load_predictions, save_predictions
from pipeline.verification import claims
from pipeline.verification.bundle import MANIFEST, unpacked, write_bundle
from pipeline.verification.claims import read_claims
from pipeline.verification.verdict import CONSISTENT, verify
from tests.campaigns.bad_saved import joined, parts
from tests.support.launch import ROOT
from tests.support.sweeps import make_configuration

SMALL = [
    "model.args={width: 8, stem_stride: 2}",  # with a width of 4, torch 2.14 crashes on some processors
    "tracking.log_every_steps=3",
    "tracking.system_every_seconds=0",
    "evaluation.every=3 steps",
    "checkpoint.every=4 steps",
    "checkpoint.keep_every=1",
]
Edit = Callable[[Path, random.Random], None]


def train_small(folder: Path) -> Path:
    """Train a run of 14 steps with 2 tickets and 4 checkpoints; return its folder, which is below ``folder``."""
    configuration, run = make_configuration(folder), folder / "run"
    command = [sys.executable, str(ROOT / "launchers" / "train.py"), "--config", str(configuration), *SMALL]
    done = subprocess.run([*command, f"output_dir={run}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return run


# -- edits: each changes one thing in a run's folder


def _journal(choose: Callable[[dict[str, Any]], bool], change: Callable[[dict[str, Any], random.Random], None]) -> Edit:
    """Change one of the records of metrics.jsonl that ``choose`` accepts."""

    def edit(run: Path, draw: random.Random) -> None:
        records = _records(run / "metrics.jsonl")
        change(draw.choice([record for record in records if choose(record)]), draw)
        _write_records(run / "metrics.jsonl", records)

    return edit


def _is_chained(record: Mapping[str, Any]) -> bool:
    return any(key.startswith(("train/", "mask/", "val/")) for key in record.get("metrics", {})) and "step" in record


def _change_metric(record: dict[str, Any], draw: random.Random) -> None:
    key = draw.choice([key for key in record["metrics"] if not key.startswith("time/")])
    record["metrics"][key] = float(record["metrics"][key]) + draw.choice([-1e-6, 0.01, 1.0])


def _change_layer(record: dict[str, Any], draw: random.Random) -> None:
    record["layers"][draw.choice(list(record["layers"]))][draw.randrange(2)] += 0.001


def _change_parameter(record: dict[str, Any], draw: random.Random) -> None:
    known = [key for key in record["params"] if key in ("seed", "sparsity.density", "model.name", "method", "run_id")]
    record["params"][draw.choice(known)] = "another"


def _change_step(record: dict[str, Any], draw: random.Random) -> None:
    record["step"] += draw.choice([-1, 1, 100])


def _drop_metrics(run: Path, draw: random.Random) -> None:
    records = _records(run / "metrics.jsonl")
    records.remove(draw.choice([record for record in records if _is_chained(record) or "child" in record]))
    _write_records(run / "metrics.jsonl", records)


def _swap_metrics(run: Path, draw: random.Random) -> None:
    records = _records(run / "metrics.jsonl")
    places = [number for number, record in enumerate(records) if _is_chained(record)]
    one, other = draw.choice([(a, b) for a in places for b in places if records[a]["step"] < records[b]["step"]])
    records[one], records[other] = records[other], records[one]
    _write_records(run / "metrics.jsonl", records)


def _chain_value(run: Path, draw: random.Random) -> None:
    _edit_chain(run, draw, relinks=False)


def _chain_relinked(run: Path, draw: random.Random) -> None:
    _edit_chain(run, draw, relinks=True)


def _edit_chain(run: Path, draw: random.Random, *, relinks: bool) -> None:
    """Change a digest or a metric in the chain, and compute all later links anew or leave them."""
    records = _records(run / "chain.jsonl")
    record = draw.choice([each for each in records if each["kind"] in ("report", "checkpoint", "ticket")])
    key = {"report": "state", "checkpoint": draw.choice(["shared", "ranks"]), "ticket": "tickets"}[record["kind"]]
    record[key] = {"last": _another(draw)} if key == "tickets" else _another(draw)
    _write_chain(run, records, relinks=relinks)


def _chain_drop(run: Path, draw: random.Random) -> None:
    records = _records(run / "chain.jsonl")
    del records[draw.randrange(1, len(records) - 1)]
    _write_chain(run, records, relinks=draw.random() < 0.5)


def _chain_swap(run: Path, draw: random.Random) -> None:
    records = _records(run / "chain.jsonl")
    at = draw.randrange(1, len(records) - 2)
    records[at], records[at + 1] = records[at + 1], records[at]
    _write_chain(run, records, relinks=draw.random() < 0.5)


def _chain_start(run: Path, draw: random.Random) -> None:
    """Claim another configuration, data set, number of ranks or machine, and link everything anew."""
    records = _records(run / "chain.jsonl")
    start = records[0]
    key = draw.choice(["config_digest", "data", "ranks", "environment"])
    changed = {"config_digest": _another(draw), "data": start["data"] | {"train": _another(draw)}, "ranks": 8}
    start[key] = (changed | {"environment": start["environment"] | {"torch": "1.0"}})[key]
    _write_chain(run, records, relinks=True)


def _ticket(**changes: Any) -> Edit:
    """Change the provenance of a ticket, and sign it anew."""

    def edit(run: Path, draw: random.Random) -> None:
        path = draw.choice(sorted((run / "tickets").glob("*.safetensors")))
        entries, header, body = parts(path.read_bytes())
        made = header["provenance"]
        key = draw.choice([key for key, value in changes.items() if made[key] != value])
        made[key] = changes[key]
        path.write_bytes(joined(entries, header, body))

    return edit


def _ticket_weight(run: Path, draw: random.Random) -> None:
    _edit_weight(draw.choice(sorted((run / "tickets").glob("*.safetensors"))), draw)


def _superposition(run: Path, draw: random.Random) -> None:
    _edit_weight(next((run / "report").glob("*.safetensors")), draw)


def _edit_weight(path: Path, draw: random.Random) -> None:
    """Change one weight of a ticket, and sign it anew."""
    entries, header, body = parts(path.read_bytes())
    start = draw.choice([entry for name, entry in entries.items() if name.startswith("values/")])["data_offsets"][0]
    changed = bytearray(body)
    changed[start + draw.randrange(3)] ^= 1 << draw.randrange(8)
    path.write_bytes(joined(entries, header, bytes(changed)))


def _swap_tickets(run: Path, draw: random.Random) -> None:
    one, other = sorted((run / "tickets").glob("*.safetensors"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _drop_ticket(run: Path, draw: random.Random) -> None:
    draw.choice(sorted((run / "tickets").glob("*.safetensors"))).unlink()


def _add_ticket(run: Path, draw: random.Random) -> None:
    path = draw.choice(sorted((run / "tickets").glob("*.safetensors")))
    entries, header, body = parts(path.read_bytes())
    header["provenance"]["index"] = 7
    path.with_name("ticket-007.safetensors").write_bytes(joined(entries, header, body))


def _checkpoint_tensor(run: Path, draw: random.Random) -> None:
    """Flip a bit of a tensor in a checkpoint."""
    folder = _some_checkpoint(run, draw)
    path = folder / draw.choice(["state.safetensors", "rank-0.safetensors"])
    content = bytearray(path.read_bytes())
    first = 8 + int.from_bytes(content[:8], "little")
    content[draw.randrange(first, len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    sign(folder)


def _checkpoint_state(run: Path, draw: random.Random) -> None:
    """Change a number in a checkpoint's state.json."""
    folder = _some_checkpoint(run, draw)
    state = json.loads((folder / "state.json").read_text())
    key = draw.choice(["steps", "history_digest", "world_size", "environment", "data_digest", "config", "samples_seen"])
    if key in state["sparsifier"]:
        state["sparsifier"][key] = 3 if key == "steps" else _another(draw)
    elif key == "config":
        state["config"]["seed"] += 1
    elif key == "environment":
        state["environment"]["threads"] += 1
    else:
        state[key] = _another(draw) if key == "data_digest" else state[key] + 1
    if key == "world_size":  # with a file for the second rank
        shutil.copy(folder / "rank-0.safetensors", folder / "rank-1.safetensors")
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    sign(folder)


def _swap_checkpoints(run: Path, draw: random.Random) -> None:
    one, other = draw.sample(sorted((run / "checkpoints").glob("step-*")), 2)
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def _some_checkpoint(run: Path, draw: random.Random) -> Path:
    return draw.choice(sorted((run / "checkpoints").glob("step-*")))


def sign(folder: Path) -> None:
    """Write the manifest of a checkpoint anew."""
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps({"files": files}, indent=1))


def _configuration(run: Path, draw: random.Random) -> None:
    text = (run / "config.yaml").read_text()
    old, new = draw.choice(
        [
            ("seed: 0\n", "seed: 1\n"),
            ("density: 0.2\n", "density: 0.1\n"),
            ("weight_decay: 0.0005\n", "weight_decay: 0.0\n"),
            ("recalibration_batches: 2\n", "recalibration_batches: 100\n"),
            ("log_every_steps: 3\n", "log_every_steps: 30\n"),
        ]
    )
    changed = text.replace(old, new, 1)
    assert changed != text, old
    (run / "config.yaml").write_text(changed)


def _report(run: Path, draw: random.Random) -> None:
    _edit_report(run, draw)


def _report_relinked(run: Path, draw: random.Random) -> None:
    """Change a number of the report, and its hash at the end of the chain."""
    _edit_report(run, draw)
    records = _records(run / "chain.jsonl")
    records[-1]["files"]["report.json"] = _sha256(run / "report" / "report.json")
    _write_chain(run, records, relinks=True)


def _edit_report(run: Path, draw: random.Random) -> None:
    path = run / "report" / "report.json"
    report = json.loads(path.read_text())
    draw.choice(report["rows"])[draw.choice(["top1", "nll", "ece", "density", "r_s"])] += draw.choice([1e-4, 0.01])
    path.write_text(json.dumps(report, indent=1) + "\n")


def _table(run: Path, draw: random.Random) -> None:
    path = run / "report" / "table.txt"
    text = path.read_text()
    at = draw.choice([place for place, character in enumerate(text) if character in "12345678"])
    path.write_text(f"{text[:at]}9{text[at + 1 :]}")


def _predictions(run: Path, draw: random.Random) -> None:
    _edit_predictions(run, draw)


def _predictions_relinked(run: Path, draw: random.Random) -> None:
    """Change a prediction, and its digest at the end of the chain: it contradicts the report."""
    from pipeline.evaluation.predictions import predictions_digest

    _edit_predictions(run, draw)
    records = _records(run / "chain.jsonl")
    found = load_predictions(run / "report" / "predictions.npz")
    records[-1]["files"]["predictions.npz"] = predictions_digest(found)
    _write_chain(run, records, relinks=True)


def _edit_predictions(run: Path, draw: random.Random) -> None:
    path = run / "report" / "predictions.npz"
    found = load_predictions(path)
    row, image = draw.randrange(len(found.names)), draw.randrange(len(found.labels))
    top1 = np.array(found.top1)
    top1[row, image] = 1 - top1[row, image]
    save_predictions(dataclasses.replace(found, top1=top1), path, data_digest=found.data_digest)


def _missing(name: str) -> Edit:
    return lambda run, _: (run / name).unlink()


# -- edits of a bundle, whose manifest is not written anew


def _manifest_hash(bundle: Path, draw: random.Random) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][draw.choice(list(manifest["files"]))] = _another(draw)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def _bundle_byte(bundle: Path, draw: random.Random) -> None:
    path = draw.choice([path for path in sorted(bundle.rglob("*")) if path.is_file() and path.name != MANIFEST])
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _bundle_file(bundle: Path, draw: random.Random) -> None:
    (bundle / "tickets" / f"ticket-00{draw.randrange(3, 9)}.safetensors").write_bytes(b"more")


KINDS: dict[str, Edit] = {
    "log: a metric": _journal(_is_chained, _change_metric),
    "log: the density of a layer": _journal(lambda record: "layers" in record, _change_layer),
    "log: a result": _journal(lambda record: "child" in record, _change_metric),
    "log: a parameter": _journal(lambda record: "params" in record, _change_parameter),
    "log: a step number": _journal(_is_chained, _change_step),
    "log: a record less": _drop_metrics,
    "log: two records swapped": _swap_metrics,
    "log: missing": _missing("metrics.jsonl"),
    "chain: a digest": _chain_value,
    "chain: a digest, links computed anew": _chain_relinked,
    "chain: a record less": _chain_drop,
    "chain: two records swapped": _chain_swap,
    "chain: another start, links computed anew": _chain_start,
    "chain: missing": _missing("chain.jsonl"),
    "ticket: a weight": _ticket_weight,
    "ticket: its provenance": _ticket(seed=9, r_s=0.99, density=0.05, step=3, method="rigl", index=1, epochs=9.0),
    "ticket: another run": _ticket(parent_run="another-run"),
    "ticket: two swapped": _swap_tickets,
    "ticket: one less": _drop_ticket,
    "ticket: one more": _add_ticket,
    "checkpoint: a bit of a tensor": _checkpoint_tensor,
    "checkpoint: a number": _checkpoint_state,
    "checkpoint: two swapped": _swap_checkpoints,
    "configuration: a key": _configuration,
    "report: a number": _report,
    "report: a number, links computed anew": _report_relinked,
    "report: the table": _table,
    "report: the superposed network": _superposition,
    "report: a prediction": _predictions,
    "report: a prediction, links computed anew": _predictions_relinked,
    "report: missing": _missing("report/report.json"),
}
OF_BUNDLE: dict[str, Edit] = {
    "manifest: a hash": _manifest_hash,
    "bundle: a bit of a file": _bundle_byte,
    "bundle: one file more": _bundle_file,
}


def problem_of(kind: str, run: Path, bundle: Path, folder: Path, draw: random.Random) -> str:
    """Tamper with a copy of the run or of its unpacked bundle in ``folder``; return how it was found.

    Empty: it was not found.
    """
    is_bundle = kind in OF_BUNDLE or draw.random() < 0.5
    shutil.copytree(bundle if is_bundle else run, folder)
    if kind in OF_BUNDLE:
        OF_BUNDLE[kind](folder, draw)
    else:
        KINDS[kind](folder, draw)
        if is_bundle:
            _write_manifest(folder)
    try:
        verify(str(folder), num_segments=0, seed=0)
    except (IntegrityError, DataError) as error:
        return str(error)
    finally:
        shutil.rmtree(folder)
    return ""


def make_bundle(run: Path, folder: Path) -> Path:
    """Write the run's bundle, and return a folder into which it is unpacked."""
    file, target = folder / "bundle.tar", folder / "bundle"
    write_bundle(run, file, list(read_claims(run, "run").checkpoints.values()))
    with unpacked(file) as there:
        shutil.copytree(there, target)
    return target


def tamperings(run: Path, bundle: Path, folder: Path, *, num: int, seed: int) -> tuple[list[str], Counter[str]]:
    """Make ``num`` tamperings, every kind in turn.

    Returns:
        Those that were not found, and how many there were of each kind.
    """
    for clean in (run, bundle):
        assert verify(str(clean), num_segments=0, seed=0).startswith(CONSISTENT)
    claims.load_config = _load_config  # type: ignore[assignment]
    draw, kinds = random.Random(seed), [*KINDS, *OF_BUNDLE]
    missed, counts = [], Counter[str]()
    for number in range(num):
        kind = kinds[number % len(kinds)]
        counts[kind] += 1
        if not problem_of(kind, run, bundle, folder / f"tampered-{number}", draw):
            missed.append(f"{number}: {kind}")
    return missed, counts


# -- files

_known: dict[bytes, Config] = {}


def _load_config(path: str, *, may_import: bool = True) -> Config:
    """Parse each configuration once, for this would take most of the time."""
    content = Path(path).read_bytes()
    if content not in _known:
        _known[content] = load_config(path, may_import=may_import)
    return _known[content]


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _write_chain(run: Path, records: Sequence[dict[str, Any]], *, relinks: bool) -> None:
    link = ""
    for record in records if relinks else ():
        link = record["link"] = link_of(link, record)
    (run / "chain.jsonl").write_text("".join(canonical(record) + "\n" for record in records))


def _write_manifest(bundle: Path) -> None:
    paths = [path for path in sorted(bundle.rglob("*")) if path.is_file() and path != bundle / MANIFEST]
    files = {path.relative_to(bundle).as_posix(): _sha256(path) for path in paths}
    (bundle / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=1))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _another(draw: random.Random) -> str:
    return draw.randbytes(32).hex()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=200, metavar="N", help="number of tamperings (default: 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the edits (default: 0)")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="tampering-") as name:
        folder = Path(name)
        run = train_small(folder)
        missed, counts = tamperings(run, make_bundle(run, folder), folder, num=given.num, seed=given.seed)
    for kind, number in counts.items():
        print(f"{number - sum(kind == each.partition(': ')[2] for each in missed):3} of {number:3} found  {kind}")
    print(f"{given.num - len(missed)} of {given.num} tamperings of {len(counts)} kinds found without running anything")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
