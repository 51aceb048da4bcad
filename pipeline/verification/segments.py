"""Draw segments of a run, and run them again from the checkpoint at which each starts. Does not need torch."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.chain import NAME, START, Record, content_of, read_chain
from pipeline.config.load import config_of, to_yaml
from pipeline.errors import DataError, IntegrityError, Preempted, RunError
from pipeline.tickets.verify import read_verified
from pipeline.verification.claims import Claims, as_values, first_difference, shown

ROOT = Path(__file__).resolve().parents[2]
SAME_DATA = "pass the data sets of the run: data.train=PATH data.val=PATH"
TRAIN = ROOT / "launchers" / "train.py"
ERROR = re.compile(r"^ERROR\[\d+\] (?:rank=\d+ )?(?:step=\d+ )?(.*)$", re.MULTILINE)
LOG, CONFIG, RUN = "log", "config.yaml", "run"
# Of the settings that a run had in its environment, those that are given to a segment that is run again.
ISA_LIMIT = re.compile(r"(?:ATEN_CPU_CAPABILITY|(?:ONEDNN|DNNL)_MAX_CPU_ISA|MKL_CBWR|MKL_ENABLE_INSTRUCTIONS)=\w+")


@dataclass(frozen=True)
class Segment:
    """The steps from one checkpoint to the next, or to the end of the run with its report."""

    start: int  # steps done; 0: the start of the run, which needs no checkpoint
    stop: int
    is_last: bool  # it ends with the report
    num_before: int  # records of the chain before it
    records: list[Record]  # of the chain, in it
    reason: str = ""  # why it cannot be run again; empty: it can

    @property
    def name(self) -> str:
        """The steps of the segment in words."""
        return f"steps {self.start}–{self.stop}"


def segments_of(claims: Claims) -> list[Segment]:
    """Return the segments between the checkpoints that are there and that the chain has, in order."""
    records = claims.checkpoint_records()
    last = claims.last_step
    starts = {0: 0} if claims.is_whole else {}
    starts |= {step: records[step][0] for step in claims.checkpoints if step in records and step < last}
    if not claims.is_ended:  # up to the last checkpoint: what comes after it may still change
        stops = [step for step in claims.checkpoints if step in records]
        last = max(stops, default=0)
        starts = {step: number for step, number in starts.items() if step < last}
    found = []
    bounds = [*sorted(starts), last]
    for start, stop in itertools.pairwise(bounds):
        is_last = stop == last and claims.is_ended
        end = len(claims.records) if is_last else records[stop][0]
        inside = claims.records[starts[start] : end]
        found.append(
            Segment(start, stop, is_last, starts[start], inside, _reason(claims, starts[start], inside, start))
        )
    return found


def _reason(claims: Claims, num_before: int, inside: Sequence[Record], start: int) -> str:
    """Return why a segment cannot be run again in one piece."""
    first = _num_first(inside, start)
    for number, record in enumerate(inside[first:], num_before + first):
        if record["kind"] == START:
            changed = first_difference(content_of(record), content_of(claims.start_at(number)))
            if changed != "environment":
                return f"{changed} changed at step {record['step']}, at a resume"
    if claims.start_at(num_before + first)["config_digest"] != claims.start["config_digest"]:
        return "its configuration is not that of config.yaml (--allow-change)"
    if claims.config.train.deepspeed:  # a profile, for instance
        return "train.deepspeed is set, with which DeepSpeed may write files anywhere"
    return ""


def _num_first(inside: Sequence[Record], start: int) -> int:
    """Return how many records at the beginning of a segment say how it computes from its first step on."""
    is_first = (record["kind"] == START and record["step"] == start for record in inside)
    return next((number for number, is_start in enumerate(is_first) if not is_start), len(inside))


def draw(segments: Sequence[Segment], number: int, *, seed: int, link: str) -> list[Segment]:
    """Draw segments without replacement, every set of ``number`` with the same chance.

    The draw depends on the last link of the chain and on the seed, which must be chosen after the run
    has been published.
    """

    def key(segment: Segment) -> bytes:
        return hashlib.sha256(f"{seed} {link} {segment.start}".encode()).digest()

    return sorted(sorted(segments, key=key)[:number], key=lambda segment: segment.start)


@dataclass(frozen=True)
class Rerun:
    """A segment that was run again."""

    segment: Segment
    folder: Path  # its output_dir
    records: list[Record]  # of its chain, in the segment
    difference: str  # the first record that differs from the claimed one, in words; empty: all are equal
    environment: dict[str, str]  # what decides bits and differs here: name -> before -> here

    @property
    def is_equal(self) -> bool:
        """Whether every digest and number is the claimed one."""
        return not self.difference


def rerun(claims: Claims, segment: Segment, folder: Path, *, overrides: Sequence[str] = ()) -> Rerun:
    """Run a segment again in the empty ``folder``, on as many ranks as the run had, as the launchers start them.

    Args:
        claims: the run.
        segment: one of its segments.
        folder: where everything is written.
        overrides: ``key=value`` settings, such as where the data sets are here.

    Raises:
        DataError: the data sets here are not those of the run.
        RunError: of the class of the error that ended it.
    """
    start = claims.start_at(segment.num_before + _num_first(segment.records, segment.start))
    output = folder / RUN
    (output / "tickets").mkdir(parents=True)
    for path in sorted((claims.folder / "tickets").rglob("*.safetensors")):
        if read_verified(path).provenance.step <= segment.start:
            target = output / "tickets" / path.relative_to(claims.folder / "tickets")
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    lines = (claims.folder / NAME).read_bytes().splitlines(keepends=True)
    (output / NAME).write_bytes(b"".join(lines[: segment.num_before]))
    (folder / CONFIG).write_text(_configuration(claims, start, output))
    resume = str(claims.checkpoints[segment.start].absolute()) if segment.start else "none"
    arguments = ["--config", str(folder / CONFIG), "--resume", resume, *overrides]
    if not segment.is_last:
        arguments += ["--stop-after", str(segment.stop)]
    _train(arguments, folder / LOG, claims, segment, num_ranks=start["ranks"], environ=_environ(start))
    records = read_chain(output / NAME)[segment.num_before :]
    differs = _difference(segment.records, records)
    now = [record for record in read_chain(output / NAME) if record["kind"] == START][-1]
    if (key := first_difference(content_of(now), content_of(start))) not in (None, "environment"):
        one, other = (shown(record[key]) for record in (start, now))
        raise DataError(f"{claims.name}: {segment.name}: {key} of the run: {one}, here: {other}", do=SAME_DATA)
    here = now["environment"]
    keys = [key for key in {**start["environment"], **here} if start["environment"].get(key) != here.get(key)]
    changes = {key: f"{start['environment'].get(key, '?')} -> {here.get(key, '?')}" for key in keys}
    return Rerun(segment, output, records, differs, changes)


def _configuration(claims: Claims, start: Mapping[str, Any], output: Path) -> str:
    """Return the configuration of a segment as YAML: the run's, with the settings it had then.

    It writes only below ``output``, whatever an untrusted configuration says.
    """
    values = as_values(claims.config)
    ours = {
        "output_dir": str(output),
        "tracking.backend": "jsonl",
        "tracking.uri": "",
        "tracking.system_every_seconds": 0.0,
        "tickets.copy_to": "",
        "data.stage": "",
        "checkpoint.keep": 1,
        "checkpoint.keep_every": 0,
        "train.threads_per_rank": int(start["environment"].get("threads", 0)),
    }
    for name, value in {**start["settings"], **ours}.items():
        *sections, key = name.split(".")
        at = values
        for section in sections:
            at = at[section]
        at[key] = value
    return to_yaml(config_of(CONFIG, values))


def _environ(start: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment of a segment, with the limits of instructions that the run had."""
    limits = [text for text in str(start["environment"].get("isa_limits", "")).split() if ISA_LIMIT.fullmatch(text)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, **dict(text.split("=", 1) for text in limits)}


def _train(
    arguments: Sequence[str],
    log: Path,
    claims: Claims,
    segment: Segment,
    *,
    num_ranks: int,
    environ: Mapping[str, str],
) -> None:
    supervisor = ["-m", "launchers.run", "--nproc-per-node", str(num_ranks), "--"] if num_ranks > 1 else []
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, *supervisor, str(TRAIN), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environ,
            check=False,
        )
    if done.returncode == (0 if segment.is_last else Preempted.code):
        return
    errors = ERROR.findall(log.read_text(errors="replace"))
    kind = next((kind for kind in RunError.__subclasses__() if kind.code == done.returncode), IntegrityError)
    raise kind(f"{claims.name}: {segment.name} could not be run again: {errors[-1] if errors else done.returncode}")


def _difference(claimed: Sequence[Record], found: Sequence[Record]) -> str:
    """Return the first record that is not as claimed, in words; records of how the run computes are left out."""
    pairs = [[record for record in of if record["kind"] != START] for of in (claimed, found)]
    for expected, got in _paired(*pairs):
        if got is None or expected is None:
            record = expected or got
            assert record is not None
            return f"the {record['kind']} of step {record['step']} is {'missing' if got is None else 'not claimed'}"
        at: list[str] = []
        one: Any = {**expected, "link": ""}
        other: Any = {**got, "link": ""}
        while isinstance(one, dict) and isinstance(other, dict) and one != other:
            at.append(str(first_difference(other, one)))
            one, other = (each.get(at[-1]) for each in (one, other))
        if at:
            what = f"the {expected['kind']} of step {expected['step']} differs: {': '.join(at)}"
            return f"{what}: claimed {shown(one)}, found {shown(other)}"
    return ""


def _paired(one: Sequence[Record], other: Sequence[Record]) -> Iterator[tuple[Record | None, Record | None]]:
    for number in range(max(len(one), len(other))):
        yield (one[number] if number < len(one) else None), (other[number] if number < len(other) else None)
