"""What a run claims, read from its folder, and where its chain says so. Does not need torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.chain import CHECKPOINT, END, NAME, REPORT, START, TICKET, UNCHANGED, Record, read_chain
from pipeline.checkpoint.verify import checkpoints_in
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, DataError, IntegrityError
from pipeline.tickets.store import Retention
from pipeline.training import run_record

BEST = "best"  # folder of the best tickets beside the last ones, and what the chain calls them


@dataclass(frozen=True)
class Claims:
    """A run's folder, or an unpacked bundle, whose chain is of one piece.

    ``name`` is what messages call it.
    """

    folder: Path
    name: str
    records: list[Record]
    config: Config
    run_id: str
    notes: list[str] = field(default_factory=list)  # what was not checked, and why

    def require(self, what: str, found: object, expected: object, *, by: str = "the chain") -> None:
        """Raise IntegrityError unless a claim is what ``by`` says."""
        if isinstance(found, dict) and isinstance(expected, dict):
            if (key := first_difference(found, expected)) is not None:
                self.require(f"{what}: {key}", found.get(key), expected.get(key), by=by)
        elif found != expected:
            raise self.wrong(f"{what}: expected {shown(expected)} as in {by}, got {shown(found)}")

    def wrong(self, what: str) -> IntegrityError:
        """Return the error for a claim that does not agree with the others."""
        return IntegrityError(f"{self.name}: {what}", do=UNCHANGED)

    @property
    def start(self) -> Record:
        """The first record: of the start of the run, or of the step at which its chain starts."""
        return self.records[0]

    @property
    def is_whole(self) -> bool:
        """Whether the chain starts at step 0."""
        return int(self.start["step"]) == 0

    @property
    def is_ended(self) -> bool:
        """Whether the run has ended, with a report."""
        return self.of_kind(END) != []

    @property
    def last_step(self) -> int:
        """The step of the last record."""
        return int(self.records[-1]["step"])

    def of_kind(self, kind: str) -> list[Record]:
        """Return the records of one kind."""
        return [record for record in self.records if record["kind"] == kind]

    def start_at(self, number: int) -> Record:
        """Return how the run computed after the first ``number`` records: the last of kind ``start``."""
        return [record for record in self.records[: max(1, number)] if record["kind"] == START][-1]

    @cached_property
    def metrics(self) -> dict[tuple[int, str], float | str]:
        """All chained metrics: (run step, name) -> value."""
        return {
            (int(step), key): value
            for record in self.records
            for step, values in record.get("metrics", {}).items()
            for key, value in values.items()
        }

    @property
    def reported_until(self) -> int:
        """The step up to which the chain has what was reported; later metrics wait for the next record."""
        steps = [record["step"] for record in self.records if record["kind"] in (REPORT, END)]
        return int(max(steps, default=self.start["step"]))

    @cached_property
    def checkpoints(self) -> dict[int, Path]:
        """The checkpoints that are there, by step, in their order."""
        found = {int(path.name.removeprefix("step-")): path for path in checkpoints_in(self.folder / "checkpoints")}
        return dict(sorted(found.items()))

    def checkpoint_records(self) -> dict[int, tuple[int, Record]]:
        """Return the records of checkpoints, by step, each with the number of records up to and including it."""
        return {
            int(record["step"]): (number, record)
            for number, record in enumerate(self.records, 1)
            if record["kind"] == CHECKPOINT
        }

    def ticket_files(self) -> Iterator[tuple[Path, str, Record]]:
        """Yield the path of every ticket that the chain has, its digest without the name of the run, and its record."""
        first = 0 if self.is_whole else self.num_earlier_tickets()
        for index, record in enumerate(self.of_kind(TICKET), first):
            for kind, digest in record["tickets"].items():
                folder = self.ticket_folder(kind)
                yield folder / f"ticket-{index:03d}.safetensors", str(digest), record

    def ticket_folder(self, kind: str) -> Path:
        """Return the folder of the ``last`` or the ``best`` tickets."""
        both = self.config.tickets.select == "both" and kind == BEST
        return self.folder / "tickets" / BEST if both else self.folder / "tickets"

    def num_earlier_tickets(self) -> int:
        """Return how many tickets are from before the chain."""
        from pipeline.tickets.verify import read_verified

        paths = (self.folder / "tickets").glob("*.safetensors")
        indices = [read_verified(path).provenance for path in paths]
        return sum(1 for of in indices if of.step <= self.start["step"])

    @property
    def retention(self) -> Retention:
        """Which tickets the run keeps."""
        return Retention(last=self.config.tickets.keep, first=self.config.tickets.keep_first)


def read_claims(folder: Path, name: str) -> Claims:
    """Read the chain, the configuration and the id of a run.

    Raises:
        DataError: the run has no chain.
        IntegrityError: the chain is not of one piece, or the configuration or id is missing or invalid.
        WriteError, PermissionDenied: a file cannot be read.
    """
    if not (folder / NAME).exists():
        raise DataError(
            f"{name}: has no {NAME}: a version of ticketworks before 0.2 trained it, or the file was removed, so "
            "there is nothing to verify it by",
            do="train it again; python -m pipeline.tickets verify checks the hashes in its tickets",
        )
    records = read_chain(folder / NAME)
    if not records:
        raise IntegrityError(f"{name}: {NAME} is empty", do=UNCHANGED)
    try:
        config = load_config(str((folder / "config.yaml").absolute()), may_import=False)
        run_id = run_record.read_run_id(folder)
    except (ConfigError, OSError) as error:
        raise IntegrityError(f"{name}: the configuration or run.json cannot be used: {error}", do=UNCHANGED) from None
    return Claims(folder, name, records, config, run_id)


def as_values(config: Config) -> dict[str, Any]:
    """Return a configuration as nested dictionaries."""
    return dataclasses.asdict(config)


def shown(value: object) -> str:
    """Return a value for a message, shortened."""
    text = "nothing" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text[:80]


def first_difference(found: Mapping[Any, Any], expected: Mapping[Any, Any]) -> Any | None:
    """Return the first key, in their order, under which two mappings differ; None if they are equal."""
    keys = sorted(k for k in {**found, **expected} if found.get(k, _NOTHING) != expected.get(k, _NOTHING))
    return keys[0] if keys else None


_NOTHING = object()
