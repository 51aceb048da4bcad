"""Save and load checkpoints: everything that a run needs to continue bit for bit.

A checkpoint is a folder ``step-00012345`` of safetensors and JSON files. It appears only when it is
complete:

* ``state.safetensors``: weights, their moving average, optimiser state and the sparsifier's state,
  sparse tensors packed as in a ticket, and the best ticket of the phase so far. Rank 0 writes it; it
  is the same for all ranks, even if the engine divides the optimiser state among them;
* ``rank-<k>.safetensors``: what differs between ranks: BatchNorm statistics and random-number state;
* ``state.json``: step, configuration, data digest, versions, changes of arithmetic, counters;
* ``manifest.json``: sha256 of the other files, written last.

Training waits only for a snapshot in memory; a thread writes it (:mod:`pipeline.checkpoint.writer`).
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
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from pipeline.chain import CHECKPOINT, Chain
from pipeline.checkpoint import arithmetic
from pipeline.checkpoint.digest import digest_of_ranks, digest_of_tensors
from pipeline.checkpoint.state import rank_state, restore_rank, restore_shared, shared_state
from pipeline.checkpoint.verify import FORMAT, checkpoints_in, files_of, find_damage, read_state, shared_digest
from pipeline.checkpoint.writer import BackgroundWriter, publish, remove_leftovers
from pipeline.config.load import differences
from pipeline.config.schema import Config
from pipeline.distributed import machine, session
from pipeline.engine.protocol import Engine
from pipeline.errors import ConfigError, IntegrityError
from pipeline.lazy import installed_version
from pipeline.plan import Plan
from pipeline.redaction import redact_all
from pipeline.schedules import length_in_steps
from pipeline.sparse.select import key_of
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.tickets.best import BestTicket

logger = logging.getLogger(__name__)

WINDOW = "log/window"  # the tensor of `Resumed.window`
BEST_TICKET = "best/ticket"  # the file of `BestTicket`, as bytes
LIBRARIES = ("torch", "torchvision", "numpy", "ffcv", "deepspeed")  # another version may change the numbers


@dataclass(frozen=True)
class Resumed:
    """Where a run continues."""

    step: int  # the next step
    tracker_run: str  # the tracker's id of the run; empty for a new one
    chain: Mapping[str, Any] | None = None  # where its chain stood; None: it has none
    # loss and top-1 of this rank, summed since the last report, and the number of steps
    window: Tensor | None = None  # float64 [3]; None: not known
    is_evaluation_left_out: bool = False  # the evaluation after the last step, because the run was asked to stop


class Checkpoints:
    """The checkpoints of one run. All ranks call every method together.

    The end of a ``with`` block waits until the last checkpoint is on disk; if the block ends by an
    error, it waits only briefly.
    """

    def __init__(
        self, folder: Path, config: Config, plan: Plan, *, data_digest: str, best: BestTicket | None = None
    ) -> None:
        self.folder = folder
        self.config = config
        self.data_digest = data_digest
        self.best = best or BestTicket()  # of the current phase, saved and restored with the rest
        self.phase_ends = {phase.stop for phase in plan.phases}
        self._writer = BackgroundWriter()
        self._token = ""  # in the names of unfinished folders, so that one left by a killed process is never reused
        self.every = length_in_steps(
            config.checkpoint.every,
            steps_per_epoch=plan.steps_per_epoch,
            global_batch=config.train.global_batch,
            reference_batch=config.plan.reference_batch,
        )

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint follows run step ``step``; the same on all ranks.

        One is due every ``checkpoint.every``, and at the end of each phase.
        """
        return (step + 1) % self.every == 0 or step + 1 in self.phase_ends

    def is_start(self, step: int) -> bool:
        """Return whether the checkpoint after ``step`` steps stays, as the start of a segment to run again."""
        segment = self.every * self.config.checkpoint.keep_every
        return bool(segment) and step % segment == 0

    def save(
        self,
        step: int,
        engine: Engine,
        sparsifier: Sparsifier,
        *,
        tracker_run: str,
        chain: Chain | None = None,
        window: Tensor | None = None,
        is_evaluation_left_out: bool = False,
        after: Callable[[], object] = lambda: None,
    ) -> Path:
        """Take a snapshot of the state after ``step`` completed steps; it is written while training continues.

        The checkpoint gets its final name after ``after()`` has returned, on a thread of rank 0, and
        checkpoints that ``checkpoint.keep`` and ``checkpoint.keep_every`` do not keep are then removed.

        Args:
            step: number of completed steps.
            engine: holds weights, optimiser state and BatchNorm statistics.
            sparsifier: holds masks and counters.
            tracker_run: the tracker's id of the run.
            chain: gets a record of the state if a checkpoint is due at this step; its position is saved.
            window: see `Resumed`.
            is_evaluation_left_out: see `Resumed`.
            after: called on a thread of rank 0.

        Returns:
            The future path of the checkpoint.

        Raises:
            WriteError, PermissionDenied: the checkpoint before this one could not be written.
        """
        self.finish()
        self._token = self._token or session.on_main(lambda: uuid.uuid4().hex[:8])
        final = self.folder / f"step-{step:08d}"
        unfinished = self.folder / f".step-{step:08d}.{self._token}.partial"
        of_rank = rank_state(engine) | ({} if window is None else {WINDOW: window.detach().cpu().clone()})
        own_files: dict[str, Callable[[], bytes]] = {
            f"rank-{session.rank()}.safetensors": partial(dump_tensors, of_rank),
        }
        optimizer_state = {name: engine.state_of(parameter) for name, parameter in engine.model.named_parameters()}
        of_ranks = digest_of_ranks(of_rank) if chain is not None else ""
        if session.is_main():
            tensors = shared_state(engine, optimizer_state, sparsifier)
            if self.best.content:
                tensors[BEST_TICKET] = torch.frombuffer(bytearray(self.best.content), dtype=torch.uint8)
            if chain is not None and self.is_due(step - 1):
                best = self.best.numbers() if self.best.held_out_digest else {}
                shared = shared_digest(digest_of_tensors(tensors), sparsifier.numbers(), best)
                chain.add(CHECKPOINT, step, shared=shared, ranks=of_ranks)
            state = {
                "format": FORMAT,
                "step": step,
                "samples_seen": step * self.config.train.global_batch,
                "world_size": session.world_size(),
                "arithmetic": len(arithmetic.CHANGES),
                "environment": environment(),
                "config": dataclasses.asdict(self.config),
                "data_digest": self.data_digest,
                "sparsifier": sparsifier.numbers(),
                "tracker_run": tracker_run,
                "chain": {} if chain is None else chain.position(),
                "is_evaluation_left_out": is_evaluation_left_out,
            }
            if self.best.held_out_digest:
                state["best"] = self.best.numbers()
            content = json.dumps(redact_all(state), indent=1).encode()
            own_files["state.safetensors"] = partial(dump_tensors, tensors)
            own_files["state.json"] = lambda: content

        def publish_and_tidy() -> None:
            after()
            if chain is not None:
                chain.sync()
            publish(unfinished, final)
            self._remove_others(step)

        self._writer.start(unfinished, own_files, all_files=files_of(session.world_size()), publish=publish_and_tidy)
        return final

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            WriteError, PermissionDenied: it could not be written; earlier checkpoints are unchanged.
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
        """Restore a checkpoint, if there is one.

        With a different number of ranks than it was saved with, every rank takes the mean of all
        ranks' BatchNorm statistics and a new random-number state; weights, optimiser state, masks and
        the order of samples are the same.

        Args:
            engine: receives weights, optimiser state and BatchNorm statistics.
            sparsifier: receives masks and counters.
            resume: ``auto`` for the newest valid checkpoint in the folder, ``none``, or the path of one.
            allowed_changes: keys of the configuration that may differ although they change what is
                computed.

        Raises:
            IntegrityError: there are checkpoints, but none is valid; the run does not silently
                restart from step 0.
            WriteError, PermissionDenied: a checkpoint cannot be read, and may be the newest valid one.
            ConfigError: the configuration differs in a key that changes what is computed and is not
                in ``allowed_changes``.
        """
        folder = self._choose(resume)
        if folder is None:
            return Resumed(0, "")
        state = read_state(folder)
        changed = differences(state["config"], dataclasses.asdict(self.config))
        if state["data_digest"] != self.data_digest:
            what = "pages, images or labels" if self.config.data.order == "quasi_random" else "images or labels"
            changed.append(f"the {what} of data.train: {state['data_digest'][:12]} -> {self.data_digest[:12]}")
        before, now = str(state["best"].get("held_out_digest", "")), self.best.held_out_digest
        if before and now and before != now:
            changed.append(f"the images or labels of evaluation.held_out: {before[:12]} -> {now[:12]}")
        refused = [change for change in changed if change.split(": ", 1)[0] not in allowed_changes]
        if refused:
            raise ConfigError(
                f"{folder}: the configuration differs from that of the checkpoint: {'; '.join(refused)}",
                do="resume with the old values, start a new run with another output_dir, or allow a change with "
                "--allow-change KEY",
                is_reported_elsewhere=not session.is_main(),
            )
        try:
            tensors = load_tensors((folder / "state.safetensors").read_bytes())
            restore_shared(tensors, engine, sparsifier, state["sparsifier"])
            if self.best.held_out_digest and BEST_TICKET in tensors:
                best = state["best"]
                self.best.keep(float(best["top1"]), int(best["num_active"]), tensors[BEST_TICKET].numpy().tobytes())
            seed = key_of(self.config.seed, int(state["step"]), session.rank())
            window = restore_rank(folder, state["world_size"], engine, seed=seed).get(WINDOW)
        except (
            KeyError,
            ValueError,
            TypeError,
            AssertionError,
            RuntimeError,
            SafetensorError,
        ) as error:  # although its hashes are right
            raise IntegrityError(
                f"{folder}: does not hold the state of this run: {type(error).__name__}: {error}",
                do="resume from another checkpoint",
            ) from error
        if session.is_main():
            _warn_about_changes(state, changed)
            logger.info("resumed from %s: step %d", folder, state["step"])
        return Resumed(
            int(state["step"]),
            str(state["tracker_run"]),
            chain=state["chain"] or None,
            window=window,
            is_evaluation_left_out=state["is_evaluation_left_out"],
        )

    def _choose(self, resume: str) -> Path | None:
        """Return the folder to resume from, which rank 0 verifies and chooses for all ranks."""
        if resume == "none":
            return None

        def choose() -> str:
            problem = ""
            for candidate in [Path(resume)] if resume != "auto" else checkpoints_in(self.folder):
                reason = find_damage(candidate)
                if not reason:
                    return str(candidate)
                problem = f"{candidate}: {reason}"
                logger.warning("checkpoint is not used: %s", problem)
            if problem:
                raise IntegrityError(
                    f"no valid checkpoint: {problem}",
                    do="resume from another copy, or start a new run with another output_dir",
                )
            return ""

        choice = session.on_main(choose)
        return Path(choice) if choice else None

    def _remove_others(self, step: int) -> None:
        """Keep the newest checkpoints up to ``step`` and the starts of segments.

        Later ones are damaged or from an abandoned course.
        """
        by_step = {int(path.name.removeprefix("step-")): path for path in checkpoints_in(self.folder)}
        up_to = sorted(number for number in by_step if number <= step)
        kept = {*up_to[-self.config.checkpoint.keep :], *filter(self.is_start, up_to)}
        for number, path in by_step.items():
            if number not in kept:
                shutil.rmtree(path, ignore_errors=True)
        remove_leftovers(self.folder)


# -- content of a checkpoint


def environment() -> dict[str, Any]:
    """Return versions and settings, apart from the configuration, on which the computed bits depend."""
    return {
        **{name: installed_version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": machine.device_name(session.device()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **machine.processor(),
    }


def _warn_about_changes(state: Mapping[str, Any], configured: Collection[str]) -> None:
    now = {**environment(), "ranks": session.world_size()}
    before = {**state["environment"], "ranks": state["world_size"]}
    changed = arithmetic.changes_since(state["arithmetic"])
    known = {key: value for key, value in now.items() if key in before or key not in machine.processor()}
    changed += [f"{key} {before.get(key)} -> {value}" for key, value in known.items() if before.get(key) != value]
    if now["ranks"] != before["ranks"]:
        changed.append(
            "masks and the order of samples are the same, but every rank has the mean of the BatchNorm statistics "
            "and a new random-number state"
        )
    if changed or configured:
        logger.warning("resume is not bit-exact: %s", ", ".join([*configured, *changed]))
