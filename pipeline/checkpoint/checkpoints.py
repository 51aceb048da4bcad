"""Exact resume: everything a run needs to go on bit for bit, as safetensors and JSON, packed like a ticket.

A checkpoint is a folder ``step-00012345`` that appears whole or not at all:

* ``state.safetensors``: weights, optimiser state and what the sparsifier keeps, as bits and active
  values (rank 0 writes; the same for all ranks, however the engine shares the optimiser state out);
* ``rank-<k>.safetensors``: what differs between ranks: BatchNorm statistics and random-number state;
* ``state.json``: step, configuration, data digest, versions, changes of arithmetic, counters;
* ``manifest.json``: sha256 of the other files, written last.

Training waits for a snapshot only; a thread writes it: ``writer``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

from pipeline.checkpoint import arithmetic
from pipeline.checkpoint.state import rank_state, restore_rank, restore_shared, shared_state
from pipeline.checkpoint.verify import FORMAT, checkpoints_in, files_of, read_state, what_is_wrong
from pipeline.checkpoint.writer import BackgroundWriter, publish, remove_leftovers
from pipeline.config import load as configuration
from pipeline.config.schema import Config
from pipeline.distributed import machine, session
from pipeline.engine.protocol import Engine
from pipeline.errors import ConfigError, IntegrityError
from pipeline.plan import Plan
from pipeline.redaction import redact_all
from pipeline.schedules import length_in_steps
from pipeline.sparse.select import key_of
from pipeline.sparse.sparsifier import Sparsifier

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "torchvision", "numpy", "ffcv", "deepspeed")  # whose versions may change the numbers


@dataclass(frozen=True)
class Resumed:
    """Where to go on."""

    step: int  # the next one to do
    tracker_run: str


class Checkpoints:
    """The checkpoints of one run. Every method is called by all ranks together.

    Used with ``with``: at the end of the block the last checkpoint is on the disk; an error that
    ends it does not wait long for that.
    """

    def __init__(self, folder: Path, config: Config, plan: Plan, *, data_digest: str) -> None:
        self.folder = folder
        self.config = config
        self.data_digest = data_digest
        self.phase_ends = {phase.stop for phase in plan.phases}
        self._writer = BackgroundWriter()
        self._token = (
            ""  # in the names of unfinished folders: those that a killed process left behind are never written to
        )
        self.every = length_in_steps(
            config.checkpoint.every,
            steps_per_epoch=plan.steps_per_epoch,
            global_batch=config.train.global_batch,
            reference_batch=config.plan.reference_batch,
        )

    def is_due(self, step: int) -> bool:
        """True when a checkpoint follows run step ``step``: every ``checkpoint.every``, and after each ticket.

        The same on all ranks.
        """
        return (step + 1) % self.every == 0 or step + 1 in self.phase_ends

    def save(
        self,
        step: int,
        engine: Engine,
        sparsifier: Sparsifier,
        *,
        tracker_run: str,
        after: Callable[[], object] = lambda: None,
    ) -> Path:
        """Take a snapshot of the state after ``step`` completed steps, which is written while training goes on; returns its place to be.

        It is published after ``after()`` (on rank 0, on a thread), and checkpoints beyond
        ``checkpoint.keep`` are then removed. Raises what
        :meth:`finish` raises, of the checkpoint before.
        """
        self.finish()
        self._token = self._token or session.on_main(lambda: uuid.uuid4().hex[:8])
        final = self.folder / f"step-{step:08d}"
        unfinished = self.folder / f".step-{step:08d}.{self._token}.partial"
        own_files: dict[str, Callable[[], bytes]] = {
            f"rank-{session.rank()}.safetensors": partial(dump_tensors, rank_state(engine)),
        }
        optimizer_state = {name: engine.state_of(parameter) for name, parameter in engine.model.named_parameters()}
        if session.is_main():
            state = {
                "format": FORMAT,
                "step": step,
                "samples_seen": step * self.config.train.global_batch,
                "world_size": session.world_size(),
                "arithmetic": len(arithmetic.CHANGES),
                "environment": _environment(),
                "config": dataclasses.asdict(self.config),
                "data_digest": self.data_digest,
                "sparsifier": sparsifier.numbers(),
                "tracker_run": tracker_run,
            }
            content = json.dumps(redact_all(state), indent=1).encode()
            own_files["state.safetensors"] = partial(dump_tensors, shared_state(engine, optimizer_state, sparsifier))
            own_files["state.json"] = lambda: content

        def publish_and_tidy() -> None:
            after()
            publish(unfinished, final)
            self._remove_others(step)

        self._writer.start(unfinished, own_files, all_files=files_of(session.world_size()), publish=publish_and_tidy)
        return final

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            WriteError, PermissionDenied: the previous checkpoints are still there.
        """
        self._writer.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self._writer.leave()

    def load(
        self, engine: Engine, sparsifier: Sparsifier, *, resume: str, allowed_changes: Collection[str] = ()
    ) -> Resumed:
        """Restore the newest valid checkpoint (``auto``), the one at the path ``resume``, or none (``none``, or nothing there yet).

        On another number of ranks than it was saved with, every rank takes the mean of all ranks'
        BatchNorm statistics and draws random numbers anew; weights, optimiser state, masks and the
        order of samples are the same.

        Raises:
            IntegrityError: when there are checkpoints but none is valid: never a silent restart from 0.
            WriteError, PermissionDenied: when one cannot be read: it may be the newest valid one.
            ConfigError: when the configuration has changed in a way that changes the mathematics,
                in other keys than ``allowed_changes``.
        """
        folder = self._choose(resume)
        if folder is None:
            return Resumed(0, "")
        state = read_state(folder)
        changed = configuration.differences(state["config"], dataclasses.asdict(self.config))
        if state["data_digest"] != self.data_digest:
            what = "pages, images or labels" if self.config.data.order == "quasi_random" else "images or labels"
            changed.append(f"the {what} of data.train: {state['data_digest'][:12]} -> {self.data_digest[:12]}")
        refused = [change for change in changed if change.split(": ", 1)[0] not in allowed_changes]
        if refused:
            raise ConfigError(
                f"{folder}: the run was started with another configuration: {'; '.join(refused)}",
                do="resume with the old values, start a new run with another output_dir, or allow a key with --allow-change KEY",
                is_reported_elsewhere=not session.is_main(),
            )
        try:
            restore_shared(
                load_tensors((folder / "state.safetensors").read_bytes()), engine, sparsifier, state["sparsifier"]
            )
            restore_rank(
                folder, state["world_size"], engine, seed=key_of(self.config.seed, int(state["step"]), session.rank())
            )
        except (
            KeyError,
            ValueError,
            TypeError,
            AssertionError,
            RuntimeError,
            SafetensorError,
        ) as error:  # its hashes agree
            raise IntegrityError(
                f"{folder}: does not hold the state of this run: {type(error).__name__}: {error}",
                do="resume from another checkpoint",
            ) from error
        if session.is_main():
            _say_what_changed(state, changed)
            logger.info("resumed from %s: step %d", folder, state["step"])
        return Resumed(int(state["step"]), str(state["tracker_run"]))

    def _choose(self, resume: str) -> Path | None:
        """The folder to resume from: rank 0 verifies, all ranks follow."""
        if resume == "none":
            return None

        def choose() -> str:
            problem = ""
            for candidate in [Path(resume)] if resume != "auto" else checkpoints_in(self.folder):
                reason = what_is_wrong(candidate)
                if not reason:
                    return str(candidate)
                problem = f"{candidate}: {reason}"
                logger.warning("checkpoint not used: %s", problem)
            if problem:
                raise IntegrityError(
                    f"no valid checkpoint: {problem}",
                    do="resume from another copy, or start anew with another output_dir",
                )
            return ""

        choice = session.on_main(choose)
        return Path(choice) if choice else None

    def _remove_others(self, step: int) -> None:
        """Keep the newest ones up to ``step``; those beyond it are damaged or belong to a course that was given up."""
        by_step = {int(path.name.removeprefix("step-")): path for path in checkpoints_in(self.folder)}
        kept = sorted(number for number in by_step if number <= step)[-self.config.checkpoint.keep :]
        for number, path in by_step.items():
            if number not in kept:
                shutil.rmtree(path, ignore_errors=True)
        remove_leftovers(self.folder)


# -- what is in a checkpoint


def _environment() -> dict[str, Any]:
    """What else the bits depend on."""
    return {
        **{name: metadata.version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": machine.device_name(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _say_what_changed(state: Mapping[str, Any], configured: Collection[str]) -> None:
    now = {**_environment(), "ranks": session.world_size()}
    before = {**state["environment"], "ranks": state["world_size"]}
    changed = arithmetic.changes_since(state["arithmetic"])
    changed += [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
    if now["ranks"] != before["ranks"]:
        changed.append(
            "masks and the order of samples are the same, every rank has the mean of the BatchNorm statistics and draws random numbers anew"
        )
    if changed or configured:
        logger.warning("resume is not bit-exact: %s", ", ".join([*configured, *changed]))
