"""Runs of a second or two for campaigns: their configurations and their results."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.ranks import Job

EVERY = 5  # steps between checkpoints
COMMON = [
    "model.args={width: 8, stem_stride: 2}",
    *("train.global_batch=64", "plan.reference_batch=64", "data.num_workers=1", "train.collective_timeout_seconds=60"),
    *(
        "evaluation.recalibration_batches=4",
        "evaluation.recalibration_batch=64",
        "evaluation.batch=125",
        "evaluation.every=never",
    ),
    *("tracking.backend=jsonl", "tracking.log_every_steps=10", "sparsity.check_every=7"),
    *("plan.exploration.length=22 steps", "plan.exploration.update_interval=4 steps", "checkpoint.keep=2"),
]
ONE_PHASE = [
    "plan.timetable=itop",
    "plan.num_refinements=0",
    "plan.refinement=null",
    "plan.exploration.length=38 steps",
]
METHODS: dict[str, list[str]] = {
    "SET": ["sparsity.method=set", *ONE_PHASE],
    "RigL": ["sparsity.method=rigl", *ONE_PHASE],
    "GraNet": ["sparsity.method=granet", "sparsity.density_until=20 steps", *ONE_PHASE],
    "EDST": [
        "plan.timetable=edst",
        "plan.num_refinements=2",
        "plan.refinement.length=8 steps",
        "plan.refinement.update_interval=3 steps",
    ],
    "Sup-tickets": ["plan.num_refinements=2", "plan.refinement.length=8 steps"],
}
STEPS = 38  # of each run; an epoch has 31
STAGES = ("train.zero_stage=0", "train.zero_stage=1")
# What a run keeps besides its network: a moving average of the weights, and the best state of a phase.
KEPT = ["train.ema_decay=0.9", "tickets.select=both", "evaluation.every=3 steps"]
CASES = {f"{name}, stage {stage[-1]}": [*overrides, stage] for stage in STAGES for name, overrides in METHODS.items()}
CASES["EDST, stage 1, best of the average"] = [*CASES["EDST, stage 1"], *KEPT, "tickets.weights=average"]


def arguments(data: Path, output: Path, *more: str, resume: str = "none", every: int = EVERY) -> list[str]:
    """Return the arguments of launchers/train.py for one run."""
    sets = {"data.train": "train", "data.val": "val", "evaluation.held_out": "held_out"}
    files = [f"output_dir={output}", *(f"{key}={data / name}.beton" for key, name in sets.items())]
    return [
        "--config",
        "fashion_mnist_s90",
        "--resume",
        resume,
        *COMMON,
        f"checkpoint.every={every} steps",
        *files,
        *more,
    ]


# -- what a run leaves


def checkpoint_at(output: Path, step: int) -> dict[str, Any]:
    """Return sha256 of all ranks' tensors, and the counters with the digest of all updates' masks."""
    folder = output / "checkpoints" / f"step-{step:08d}"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    counters = json.loads((folder / "state.json").read_text())["sparsifier"]
    return {name: digest for name, digest in files.items() if name.endswith(".safetensors")} | counters


def outcome_of(output: Path, steps: int = STEPS) -> dict[str, Any]:
    """Return what must agree bit for bit: the last checkpoint, all tickets, the report's numbers."""
    folder = output / "tickets"
    tickets = {str(path.relative_to(folder)): _ticket_content(path) for path in folder.rglob("*.safetensors")}
    report = json.loads((output / "report" / "report.json").read_text())["rows"]
    return {"checkpoint": checkpoint_at(output, steps), "tickets": tickets, "report": report, "chain": chain_of(output)}


def chain_of(output: Path) -> list[tuple[Any, ...]]:
    """Return what the chain says of the network, its masks and tickets, whenever checkpoints and evaluations come."""
    from pipeline.chain import CHECKPOINT, START, read_chain

    def without_evaluations(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        kept = {step: {key: at[key] for key in at if not key.startswith("val/")} for step, at in metrics.items()}
        return {step: found for step, found in kept.items() if found}

    return [
        (record["kind"], record["step"], record.get("state"), record.get("tickets"), record.get("files"))
        + ((without_evaluations(record["metrics"]),) if "metrics" in record else ())
        for record in read_chain(output / "chain.jsonl")
        if record["kind"] not in (START, CHECKPOINT)
    ]


def _ticket_content(path: Path) -> str:
    """Digest every tensor, mask and counter, but not the id of the run, which the file also has."""
    from pipeline.tickets.format import decode

    ticket = decode(path)
    made = ticket.provenance
    sha = hashlib.sha256(f"{made.mask_digest} {made.r_s} {made.step} {made.extra}".encode())
    for name, tensor in sorted(ticket.state.items()):
        sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def upper_bound(failures: int, trials: int) -> float:
    """Return the upper 95% bound (one-sided, Clopper–Pearson) of the failure rate.

    Without failures it is 1 − 0.05^(1/n), about 3/n.
    """
    if failures >= trials:
        return 1.0
    low, high = failures / trials, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        chance = sum(math.comb(trials, k) * middle**k * (1 - middle) ** (trials - k) for k in range(failures + 1))
        low, high = (middle, high) if chance > 0.05 else (low, middle)
    return high


def differs(what: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> int:
    """Return 1 and print the keys if the two differ; otherwise 0."""
    keys = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    if keys:
        print(f"DIFFERS {what}: {', '.join(keys)}", flush=True)
    return int(bool(keys))


def require_codes(job: Job, codes: Sequence[int]) -> None:
    found = job.wait()
    assert found == list(codes), f"{found}\n{job.text[-4000:]}"


def log_of(folder: Path) -> Path:
    """Return an unused name for a log."""
    return Path(tempfile.mkstemp(dir=folder, suffix=".log")[1])
