"""Makes a rank fail from the inside; called before it trains (``RankServer.start(inject=…)``)."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

NEVER_THE_SAME = re.compile(r"\.[0-9a-f]{8,32}(?=\.)")  # the token in the name of an unfinished folder


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()  # the signal comes at once, but possibly to another thread first


# -- kills at chosen moments


def in_function(*, rank: int, on_rank: int, function: str, number: int) -> None:
    """Kill rank ``on_rank`` at its ``number``-th call of ``module:Class.method``."""
    if rank != on_rank:
        return
    calls = 0

    def before(*_args: Any, **_kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            die()

    _wrap(function, before)


def at_file_operation(*, rank: int, on_rank: int, folder: str, label: str = "", list_to: str = "") -> None:
    """Kill a rank right before a file operation under ``folder``, or list all operations in order.

    Operations are named as by :func:`_label`.
    """
    root = Path(folder).resolve()
    listed = Path(f"{list_to}.{rank}").open("a", buffering=1) if list_to else None  # noqa: SIM115

    def happens(operation: str, path: Path) -> None:
        name = _label(operation, path, root)
        if name and listed is not None:
            listed.write(name + "\n")
        if name and rank == on_rank and name == label:
            die()

    _watch_files(happens)


def _label(operation: str, path: Path, root: Path) -> str:
    """Return, e.g., ``fsync checkpoints/.step-00000008.partial/.state.json.tmp``; else empty."""
    place = path.parent.resolve() / path.name
    return f"{operation} {NEVER_THE_SAME.sub('', str(place.relative_to(root)))}" if root in place.parents else ""


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def _watch_files(happens: Callable[[str, Path], None]) -> None:
    """Call ``happens`` right before every operation that changes a file or a folder.

    It is called twice for a write, the second time halfway.
    """
    from pipeline import files
    from pipeline.checkpoint import writer
    from pipeline.tickets import store

    is_inside = threading.local()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        names = {
            "os.rename": ("rename", 2),
            "os.remove": ("remove", 1),
            "os.mkdir": ("mkdir", 2),
            "os.rmdir": ("rmdir", 1),
        }
        if getattr(is_inside, "yes", False):
            return
        is_inside.yes = True
        try:
            if (
                event == "open"
                and isinstance(arguments[0], str)
                and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            ):
                happens("create", Path(arguments[0]))
            elif event in names:
                name, place = names[event]
                folder = _path_of(arguments[place]) if arguments[place] >= 0 else Path()
                happens(name, folder / os.fsdecode(arguments[0]))
        finally:
            is_inside.yes = False

    fsync = os.fsync

    def synced(descriptor: int) -> None:
        happens("fsync", _path_of(descriptor))
        fsync(descriptor)

    def write_durably(file: BinaryIO, content: bytes) -> None:
        path, half = _path_of(file.fileno()), len(content) // 2
        happens("write", path)
        file.write(content[:half])
        file.flush()
        happens("write half of", path)
        file.write(content[half:])
        file.flush()
        os.fsync(file.fileno())

    os.fsync = synced
    for module in (files, store, writer):
        if hasattr(module, "write_durably"):
            module.write_durably = write_durably
    sys.addaudithook(audit)


# -- faults


def fail_in(*, rank: int, on_rank: int, step: int, what: str, seconds: float = 0.0) -> None:
    """Make rank ``on_rank`` fail at ``step``.

    ``what`` is ``raise``, ``data`` (a data error), ``nan`` (in its images), ``stop`` (SIGSTOP) or
    ``term`` (SIGTERM), or ``slow``, which applies to every step.
    """
    from pipeline.data.loaders import TrainLoader
    from pipeline.errors import DataError

    steps = TrainLoader.steps

    def faulty(self: TrainLoader, start: int, stop: int) -> Iterator[Any]:
        for index, (images, labels) in steps(self, start, stop):
            if rank == on_rank and index == step:
                if what == "raise":
                    raise ValueError("an image that nobody expected")
                if what == "data":
                    raise DataError("an image that is damaged")
                if what == "nan":
                    images[0, 0, 0, 0] = float("nan")
                if what == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if what == "term":
                    os.kill(os.getpid(), signal.SIGTERM)
            if rank == on_rank and what == "slow":
                time.sleep(seconds)
            yield index, (images, labels)

    TrainLoader.steps = faulty  # type: ignore[method-assign]


def flip_mask_bit(*, rank: int, on_ranks: list[int], step: int) -> None:
    """Flip one bit of one mask silently, before the optimiser step of ``step``."""
    from pipeline.sparse.sparsifier import Sparsifier

    def before(self: Sparsifier, *_args: Any, **_kwargs: Any) -> None:
        if rank in on_ranks and self.steps == step:
            mask = self.masks["blocks.1.conv1.weight"]
            mask[0, 0, 0, 0] = not mask[0, 0, 0, 0]

    _wrap("pipeline.sparse.sparsifier:Sparsifier.before_step", before)


def evaluate(*, rank: int, arguments: list[str], on_rank: int) -> None:
    """Run ``launchers/evaluate.py`` instead; rank ``on_rank`` finds its share of the data damaged."""
    from launchers import evaluate as program
    from launchers import evaluate_cli
    from pipeline.command_line import leave
    from pipeline.data import loaders
    from pipeline.distributed import session
    from pipeline.errors import DataError
    from pipeline.evaluation import report

    def judge(*_args: Any, **_kwargs: Any) -> None:
        if rank == on_rank:
            raise DataError("an image that is damaged")
        session.barrier()

    loaders.open_eval_loader = lambda *_args, **_kwargs: None  # type: ignore[assignment]
    report.evaluate_tickets = judge  # type: ignore[assignment]
    leave(evaluate_cli.main(program.evaluate, arguments))


def slow_evaluation(*, rank: int, seconds: float) -> None:
    """Slow down every batch of an evaluation, and print that it is slow."""

    def before(*_args: Any) -> None:
        print("evaluating slowly", flush=True)
        time.sleep(seconds)

    _wrap("pipeline.evaluation.predict:Networks.__call__", before)


def as_user(*, rank: int, uid: int, at: str = "pipeline.training.run_folder:open_run_folder") -> None:
    """Become another user without privileges before anything is written.

    By then, everything in root's home has been imported.
    """

    def before(*_args: Any, **_kwargs: Any) -> None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)

    _wrap(at, before)


def _wrap(name: str, before: Callable[..., None]) -> None:
    """Call ``before`` with the arguments of every call of ``module:attribute.path``."""
    import importlib

    module, path = name.split(":")
    *owners, last = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    wrapped = getattr(owner, last)

    def call(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        return wrapped(*args, **kwargs)

    setattr(owner, last, call)


def note_samples(*, rank: int, path: str, stop_after: int | None = None) -> None:
    """Record the samples of every step, and print the masks that a resumed run starts from.

    The run is asked to stop after ``stop_after`` steps.
    """
    import hashlib
    import json

    from pipeline.data.loaders import TrainLoader
    from pipeline.sparse.masks import mask_digest
    from pipeline.sparse.sparsifier import Sparsifier

    steps, load_state_dict = TrainLoader.steps, Sparsifier.load_state_dict
    noted = Path(f"{path}.{os.getpid()}").open("w")  # noqa: SIM115

    def noting(self: TrainLoader, start: int, stop: int) -> Iterator[Any]:
        for index, (images, labels) in steps(self, start, stop):
            digests = [hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:12] for image in images]
            print(json.dumps({"step": index, "rank": rank, "images": digests}), file=noted, flush=True)
            if index + 1 == stop_after:
                os.kill(os.getpid(), signal.SIGUSR1)
            yield index, (images, labels)

    def restored(self: Sparsifier, *args: Any) -> None:
        load_state_dict(self, *args)
        print(f"masks resumed {mask_digest(self.masks)}", flush=True)

    TrainLoader.steps = noting  # type: ignore[method-assign]
    Sparsifier.load_state_dict = restored  # type: ignore[method-assign]
