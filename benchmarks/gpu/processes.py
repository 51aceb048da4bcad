"""Parts ``ranks`` and ``resume``: several processes on one device, some of which are killed.

Neither part may touch CUDA itself, because its processes are forks of it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import loop
from benchmarks.gpu.feed import Images, loader_of
from benchmarks.gpu.loop import DROP_FRACTION, Trainer, on_device
from benchmarks.gpu.report import Options, Report
from pipeline.checkpoint.state import rank_state, restore_rank_from, restore_shared, shared_state
from pipeline.distributed.rank_variables import free_port
from pipeline.errors import RunError

FORK = multiprocessing.get_context("fork")
BATCH, UPDATE_EVERY = 32, 4
NUM_STEPS, SAVED_AT, KILLED_AT = 24, 10, 13
END_SECONDS = 60.0  # of a process; a rank must end within it after its peer was killed
STALL_MS = 300.0

Work = Callable[[Options, Path], dict[str, Any]]


@contextmanager
def working_folder() -> Iterator[Path]:
    """Make a temporary folder, and remove it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-acceptance-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def started(work: Work, given: Options, file: Path, environment: dict[str, str] | None = None) -> Any:
    """Start a process that does ``work`` and writes its result, or the name of its error, to ``file``."""

    def body() -> None:
        os.environ.update(environment or {})
        try:
            result = work(given, file.parent)
        except RunError as error:
            result = {"error": type(error).__name__, "what": error.what}
        result["ended"] = time.time()
        file.write_text(json.dumps(result))
        os._exit(0)  # a process group whose peer was killed cannot be left in an orderly way

    process = FORK.Process(target=body)
    process.start()
    return process


def result_of(process: Any, file: Path, seconds: float) -> dict[str, Any]:
    """Wait for a process and return what it has written; ``{"code": …}`` if it has written nothing."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return {"code": "still running"}
    return json.loads(file.read_text()) if file.exists() else {"code": process.exitcode}


# -- two ranks


def ranks(given: Options, report: Report) -> None:
    """Train on two ranks that share the device: packed and whole gradients, and after one rank was killed."""
    with working_folder() as folder:
        found = {}
        for way in ("packed", "dense", "ddp"):
            found[way] = of_two_ranks(given, folder / way, seconds=END_SECONDS)
        first = found["packed"][0]
        wrong = [
            way for way, results in found.items() for result in results if result != first or "weights" not in result
        ]
        report.check(
            "packed, whole gradients, ddp",
            not wrong,
            f"weights and masks on 2 ranks after {NUM_STEPS} steps" + (f"; other: {', '.join(wrong)}" * bool(wrong)),
            "equal bits",
        )
        survivor, killed = of_two_ranks(given, folder / "killed", seconds=END_SECONDS)
        at = folder / "killed" / "at"
        after = float(survivor.get("ended", "inf")) - (float(at.read_text()) if at.exists() else 0.0)
        text = f"rank 0 ended with {survivor.get('error', survivor)} after {after:.1f} s; rank 1: {killed.get('code')}"
        is_right = survivor.get("error") == "PeerError" and killed.get("code") == -signal.SIGKILL
        report.check("a rank is killed", is_right and after <= END_SECONDS, text, f"PeerError within {END_SECONDS:g} s")


def of_two_ranks(given: Options, folder: Path, *, seconds: float) -> list[dict[str, Any]]:
    """Run :func:`one_rank` twice; the name of the folder says how."""
    folder.mkdir()
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    files = [folder / f"rank-{rank}.json" for rank in (0, 1)]
    processes = [
        started(one_rank, given, file, {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, file in enumerate(files)
    ]
    results = [result_of(process, file, seconds) for process, file in zip(processes, files, strict=True)]
    if folder.name != "killed":
        for result in results:
            result.pop("ended", None)
    return results


def one_rank(given: Options, folder: Path) -> dict[str, Any]:
    """Train one of two ranks."""
    rank, way = int(os.environ["RANK"]), folder.name
    settings: dict[str, Any] = {"reduction": "dense"} if way == "dense" else {"engine": "ddp"} if way == "ddp" else {}
    with on_device(given, backend="gloo", is_deterministic=True):
        ours = Trainer(loop.small_network(), num_images=2 * BATCH, check_every=2, **settings)
        for step in range(NUM_STEPS):
            if way == "killed" and rank == 1 and step == KILLED_AT:
                (folder / "at").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            images, labels = loop.batch(given, BATCH, 32, num_classes=10, seed=2 * step + rank)
            ours.step(images, labels, due(step))
        # each rank has its own BatchNorm statistics
        state = {name: parameter.detach() for name, parameter in ours.engine.model.named_parameters()}
        return {"weights": loop.digest_of(state), "history": ours.sparsifier.history_digest}


def due(step: int) -> float | None:
    return DROP_FRACTION if step % UPDATE_EVERY == UPDATE_EVERY - 1 else None


# -- resume


def resume(given: Options, report: Report) -> None:
    """Train straight; train, save, get killed and go on in a new process; compare the bits."""
    with working_folder() as folder:
        straight, _, resumed = (
            result_of(started(work, given, folder / f"{name}.json"), folder / f"{name}.json", END_SECONDS)
            for name, work in (("straight", train_straight), ("killed", train_and_die), ("resumed", train_on))
        )
        (a, b) = ({key: result.get(key) for key in ("state", "masks", "history")} for result in (straight, resumed))
        text = f"killed in step {KILLED_AT}, resumed from step {SAVED_AT}, {NUM_STEPS} steps"
        problem = "".join(
            f"; {name}: {each}" for name, each in (("straight", straight), ("resumed", resumed)) if "state" not in each
        )
        report.check("SIGKILL and resume", a == b and not problem, text + problem, "equal bits")
        stall = result_of(started(measure_stall, given, folder / "stall.json"), folder / "stall.json", END_SECONDS)
        if "ms" not in stall:
            report.check("snapshot", False, str(stall), "made")
            return
        report.at_most("snapshot of a checkpoint", stall["ms"], STALL_MS, f"{stall['ms']:.0f} ms of {given.model}")


def train_straight(given: Options, folder: Path) -> dict[str, Any]:
    return train(given, folder, is_saving=True, is_resuming=False, killed_at=None)


def train_and_die(given: Options, folder: Path) -> dict[str, Any]:
    return train(given, folder, is_saving=True, is_resuming=False, killed_at=KILLED_AT)


def train_on(given: Options, folder: Path) -> dict[str, Any]:
    return train(given, folder, is_saving=False, is_resuming=True, killed_at=None)


def train(given: Options, folder: Path, *, is_saving: bool, is_resuming: bool, killed_at: int | None) -> dict[str, Any]:
    """Train on images of a loader from the start or from the saved state, which is that of the checkpoints."""
    with on_device(given, is_deterministic=True):
        ours = Trainer(loop.small_network(), num_images=BATCH, ema_decay=0.9)
        start = 0
        if is_resuming:
            saved = torch.load(folder / "state.pt", weights_only=True)
            restore_shared(saved["shared"], ours.engine, ours.sparsifier, saved["numbers"])
            restore_rank_from([saved["rank"]], ours.engine, is_same=True, seed=0)
            start = SAVED_AT
        images = loader_of(Images.made(256, 32), num_images=BATCH)
        for step, given_batch in images.steps(start, NUM_STEPS):
            if step == SAVED_AT and is_saving:
                torch.save(snapshot(ours), folder / "new.pt")
                (folder / "new.pt").replace(folder / "state.pt")
            if step == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            ours.step(*given_batch, due(step))
        return ours.digests()


def snapshot(ours: Trainer) -> dict[str, Any]:
    """Return what a checkpoint of one rank holds."""
    states = {name: ours.engine.state_of(parameter) for name, parameter in ours.engine.model.named_parameters()}
    return {
        "shared": shared_state(ours.engine, states, ours.sparsifier),
        "numbers": ours.sparsifier.numbers(),
        "rank": rank_state(ours.engine),
    }


def measure_stall(given: Options, folder: Path) -> dict[str, Any]:
    """Time the snapshot for which training waits, in milliseconds."""
    with on_device(given):
        images, labels = loop.batch(given, 8, 64)
        ours = Trainer(loop.network(given), num_images=8)
        ours.step(images, labels)
        return {"ms": 1000 * statistics.median(loop.seconds_of(lambda: snapshot(ours)) for _ in range(3))}
