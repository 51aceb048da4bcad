"""Starts ranks as forks of one process that has imported everything.

They are real processes with real gloo and real signals, without seconds of imports each. The server
(``python -m tests.support.ranks``) reads one JSON object per line, which asks for forks that train,
and answers with their process ids; it reports each end in one line. It compiles FFCV's decoders
once, and its forks use them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.launch import ROOT, free_port

START_SECONDS = 240  # imports and compilation on a busy machine


@dataclass
class Job:
    """A run of several ranks."""

    server: RankServer
    pids: list[int]
    log: Path

    def wait(self, timeout_seconds: float = 120) -> list[int]:
        """Wait for the exit codes by rank, negative for a signal.

        Ranks that do not end in time are killed, and the test fails.
        """
        deadline = time.monotonic() + timeout_seconds
        with self.server.changed:
            while not self.is_over and time.monotonic() < deadline:
                self.server.changed.wait(0.1)
        if not self.is_over:
            self.kill()
            raise AssertionError(f"still running after {timeout_seconds} s:\n{self.text[-4000:]}")
        return [self.server.ended[pid] for pid in self.pids]

    @property
    def is_over(self) -> bool:
        return all(pid in self.server.ended for pid in self.pids)

    @property
    def text(self) -> str:
        """The output of the ranks so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, condition: Any, timeout_seconds: float = 120) -> None:
        """Wait until ``condition()`` is true; fail if the job ends before, or at the time-out."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            assert not self.is_over, self.text[-4000:]
            assert time.monotonic() < deadline, self.text[-4000:]
            time.sleep(0.002)

    def kill(self, number: signal.Signals = signal.SIGKILL, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to all ranks, or to some."""
        for rank, pid in enumerate(self.pids):
            if (ranks is None or rank in ranks) and pid not in self.server.ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)


@dataclass
class RankServer:
    """The client of the server.

    ``with RankServer.running(arguments of a run on the data to be used) as server:
    server.start(…)``.
    """

    process: subprocess.Popen[str]
    changed: threading.Condition = field(default_factory=threading.Condition)
    ended: dict[int, int] = field(default_factory=dict)
    answers: list[list[int]] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def running(cls, arguments: Sequence[str], *, prefix: Sequence[str] = (), log: Path) -> Iterator[RankServer]:
        """Start the server; ``prefix`` is put before its command (``unshare …``)."""
        environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        environ["NUMBA_THREADING_LAYER"] = "workqueue"  # may be forked
        command = [*prefix, sys.executable, "-m", "tests.support.ranks", *arguments]
        with log.open("ab") as stderr:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        server = cls(process)
        reader = threading.Thread(target=server._read, daemon=True)
        reader.start()
        try:
            with server.changed:
                assert server.changed.wait_for(lambda: server.answers or process.poll() is not None, START_SECONDS), (
                    log.read_text()
                )
            assert server.answers, log.read_text()[-4000:]
            server.answers.clear()
            yield server
        finally:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()  # the server then kills its forks and ends
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            reader.join(5)

    def start(
        self,
        arguments: Sequence[str],
        *,
        ranks: int = 2,
        log: Path,
        inject: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Job:
        """Start ``launchers/train.py ARGUMENTS`` on ``ranks`` ranks.

        ``inject`` is ``{"call": "module:function", …}``; the function is called with ``rank=`` and
        the other entries.
        """
        log.touch()
        request = {
            "arguments": list(arguments),
            "ranks": ranks,
            "log": str(log),
            "inject": dict(inject or {}),
            "environ": dict(environ or {}),
        }
        assert self.process.stdin is not None
        with self.changed:
            self.process.stdin.write(json.dumps({**request, "port": free_port()}) + "\n")
            self.process.stdin.flush()
            assert self.changed.wait_for(lambda: self.answers, 60), "the server of ranks does not answer"
            return Job(self, self.answers.pop(), log)

    def mount(self, folder: Path, options: str) -> Path:
        """Mount a tmpfs that only the server and its ranks see as ``folder``.

        Needs ``prefix=unshare --mount``. Returns the path under which others see it.
        """
        subprocess.run(
            [
                "nsenter",
                "--mount",
                f"--target={self.process.pid}",
                "mount",
                "-t",
                "tmpfs",
                "-o",
                options,
                "tmpfs",
                str(folder),
            ],
            check=True,
        )
        return Path(f"/proc/{self.process.pid}/root{folder}")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            with self.changed:
                if "pids" in event:
                    for pid in event["pids"]:
                        self.ended.pop(pid, None)  # an earlier process with this id
                    self.answers.append(event["pids"])
                else:
                    self.ended[event["pid"]] = event["code"]
                self.changed.notify_all()
        with self.changed:
            self.changed.notify_all()


# -- the server's side


def reuse_loaders(arguments: Sequence[str]) -> None:
    """Compile the loaders for the data of ``arguments`` now.

    Every later run in this process or a fork of it uses them, unless it reads folders.
    """
    from launchers.train_cli import parse
    from pipeline.config.load import load_config
    from pipeline.datasets.sets import DataSets, inspect, open_data_sets
    from pipeline.distributed import session
    from pipeline.training import assembly

    given = parse(arguments)
    config = load_config(given.config, given.overrides)
    sets = open_data_sets(config)
    open_anew = assembly.open_loaders
    compiled = open_anew(config, sets)
    next(compiled.train.steps(0, 1))
    next(iter(compiled.val.batches()))
    num_val = compiled.val.num_samples
    held_out = None
    if config.evaluation.held_out:
        info = inspect(config.evaluation.held_out)
        held_out = assembly.open_held_out_loader(config, dataclasses.replace(sets, held_out=info))
        assert held_out is not None
        next(iter(held_out.batches()))

    def open_loaders(config: Any, sets: DataSets, *, max_val_samples: int | None = None) -> assembly.Loaders:
        if config.data.loader == "folder":  # compiles nothing
            return open_anew(config, sets, max_val_samples=max_val_samples)
        train, val = compiled.train, compiled.val
        for loader in filter(None, (train, val, held_out)):
            loader._rank, loader._world_size = session.rank(), session.world_size()
        train._global_batch, train._seed, val._batch = config.train.global_batch, config.seed, config.evaluation.batch
        train.steps_per_epoch = train.num_samples // train._global_batch
        train.seconds_waited = val.seconds_waited = 0.0
        val.num_samples = min(num_val, max_val_samples or num_val)
        if sets.held_out is None:
            return compiled
        return dataclasses.replace(compiled, held_out=held_out, held_out_digest=sets.held_out.digest)

    assembly.open_loaders = open_loaders


def without_figures() -> None:
    """Write no figures from now on: drawing would take most of the time of a small run."""
    from types import SimpleNamespace

    from pipeline.evaluation import publish

    without: Any = SimpleNamespace(
        NAMES=(), figures=lambda report: {"overview": ("", None)}, png=lambda drawn: b"", pdf=lambda drawn: b""
    )
    publish.figure = without  # type: ignore[attr-defined]
    of_training: Any = SimpleNamespace(NAMES=(), figures=lambda history, report, ticket_steps: {})
    publish.training_figures = of_training  # type: ignore[attr-defined]


def _call(name: str) -> Callable[..., Any]:
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def _train(request: Mapping[str, Any], rank: int) -> None:
    """Become a rank in a fork, and never return."""
    from launchers import train_cli
    from launchers.train import train
    from pipeline.command_line import leave

    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    output = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    ranks = request["ranks"]
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_PORT": request["port"],
    }
    os.environ.update(
        {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"} | request["environ"]
    )
    inject = dict(request["inject"])
    if inject:
        _call(inject.pop("call"))(rank=rank, **inject)
    leave(train_cli.main(train, request["arguments"]))


def main(arguments: Sequence[str]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in PRELOADED:
        importlib.import_module(name)
    if arguments:
        reuse_loaders(arguments)
        without_figures()
    children: set[int] = set()

    def say(**event: object) -> None:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()

    say(pids=[])
    buffer = b""
    while True:
        if select.select([0], [], [], 0.01)[0]:
            content = os.read(0, 1 << 16)
            if not content:
                break
            *lines, buffer = (buffer + content).split(b"\n")
            for line in lines:
                request, pids = json.loads(line), []
                for rank in range(request["ranks"]):
                    if not (pid := os.fork()):
                        try:
                            _train(request, rank)
                        except BaseException:
                            traceback.print_exc()
                        finally:
                            os._exit(70)
                    pids.append(pid)
                children |= set(pids)
                say(pids=pids)
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                children.remove(pid)
                say(pid=pid, code=os.waitstatus_to_exitcode(status))
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(0)


PRELOADED = (
    "launchers.train",
    "pipeline.training.assembly",
    "pipeline.checkpoint.checkpoints",
    "pipeline.training.step_log",
    "pipeline.engine.deepspeed_engine",
    "deepspeed",
    "deepspeed.moe.ep_router",
    "deepspeed.module_inject.auto_ep_presets.registry",
    "torch._dynamo",
)

if __name__ == "__main__":
    main(sys.argv[1:])
