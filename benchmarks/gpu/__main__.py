"""Accept a GPU in one command, on a machine that nobody has prepared: ``python -m benchmarks.gpu``.

Needs Python 3.11 or newer, torch 2.11 or newer, torchvision and numpy, and no network. It first prints
which wheels to bring, if any. It takes at most ``--minutes`` (9), prints a line for every result and
writes all of them to ``--json``. Parts, for ``--only``:

masks       masks on the GPU equal those of the CPU, for every method, scope and structure
step        a training step of ResNet-50: plain torch at its best, our dense and our sparse loop, at
            256 and 64 images, at least 20 steps between two synchronisations; memory
waits       how often the host waits in a step, check and update; kernels launched
update      a whole topology update
ranks       two ranks on the one GPU: packed = whole gradients; one of them killed
feed        images on their way to the GPU, alone and while a network trains; pixels = the CPU's
resume      SIGKILL, and the same bits after a resume; how long a checkpoint stops training
evaluation  recalibration, predictions, scores and attacks = the CPU's
compile     compiled training: gradients, bits, time
structures  ViT-B with 2:4 and block masks through torch's sparse kernels / dense
deepspeed   the step in the engine deepspeed / torch, if deepspeed is installed
study       with --study SECONDS: runs of the study's cells, from the file of
            ``python -m benchmarks.study pack``

Ends with 1 if a result is wrong or a part fails, with 0 otherwise, however slow it is.
``--device cpu --quick`` runs the same code without a GPU in two minutes; its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.command_line import leave, local_path
from pipeline.lazy import installed_version

NEEDED = {"torch": "2.11", "torchvision": "", "numpy": ""}  # the oldest version
OF_DEEPSPEED = (
    *("deepspeed", "hjson", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "ninja", "einops"),
    *("msgpack", "psutil", "py-cpuinfo", "tqdm", "packaging"),
)
# part -> seconds that it should take on a GPU; the longest part of them is compiling and measuring
SECONDS = {
    "masks": 25.0,
    "step": 110.0,
    "waits": 30.0,
    "update": 30.0,
    "ranks": 50.0,
    "feed": 40.0,
    "resume": 50.0,
    "evaluation": 25.0,
    "compile": 90.0,
    "structures": 50.0,
    "deepspeed": 30.0,
    "study": 0.0,
}
QUICK_SECONDS = 2.0  # of a part with --quick, which also stops after the least number of rounds


@dataclass
class Outcome:
    """What became of one part."""

    status: str = "done"  # or "not run: …", "failed: …"
    seconds: float = 0.0
    lines: list[dict[str, Any]] = field(default_factory=list)


def main() -> int:
    """Run the command and return its exit code."""
    given = _parser().parse_args()
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process of the part is ended as well
    if (missing := wheels()) is not None:
        print(missing, flush=True)
        return 1
    from benchmarks.gpu.report import WRONG, Options

    options = Options(
        device=given.device,
        is_quick=given.quick,
        threads=given.threads,
        model=given.model or ("resnet50" if given.device == "cuda" else "cifar_resnet8" if given.quick else "resnet18"),
        pack=given.pack,
        study_seconds=given.study,
    )
    machine, problem = in_a_fork(describe, options, 60.0, print_line=lambda line: None)
    if problem:
        print(f"benchmarks.gpu: {problem}", file=sys.stderr)
        return 1
    about = machine[0]
    print("; ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    outcomes: dict[str, Outcome] = {}
    for name in given.only:
        left = 60 * given.minutes - (time.monotonic() - started)
        outcomes[name] = outcome = part(name, options, left)
        if outcome.status != "done":
            print(f"{name:30} {outcome.status}", flush=True)
    lines = [line for outcome in outcomes.values() for line in outcome.lines]
    wrong = [line["name"] for line in lines if line["verdict"] == WRONG]
    wrong += [f"{name}: {each.status}" for name, each in outcomes.items() if each.status.startswith("failed")]
    missed = [line["name"] for line in lines if line["verdict"] == "missed"]
    content = {
        "machine": about,
        "arguments": sys.argv[1:],
        "seconds": round(time.monotonic() - started, 1),
        "wrong": wrong,
        "missed": missed,
        "parts": {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()},
    }
    given.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(f"{given.json}: {len(lines)} results in {content['seconds']} s; missed: {', '.join(missed) or 'none'}")
    print(f"wrong: {', '.join(wrong) or 'none'}", flush=True)
    return 1 if wrong else 0


def wheels() -> str | None:
    """Print which packages there are; return a line that says which wheels to bring, or None."""
    found = {name: _installed(name) for name in NEEDED}
    lacking = [
        name + (f">={oldest}" if oldest else "")
        for name, oldest in NEEDED.items()
        if not found[name] or _numbers(found[name]) < _numbers(oldest)
    ]
    here = f"python {platform.python_version()}, " + ", ".join(
        f"{name} {version or 'missing'}" for name, version in found.items()
    )
    tag = f"{sys.version_info.major}.{sys.version_info.minor}"
    bring = f"python -m pip download --python-version {tag} --only-binary :all: -d wheels"
    print(f"{here}; to bring: {' '.join(lacking) or 'nothing'}", flush=True)
    if not _installed("deepspeed"):
        print(f"for the part deepspeed bring also the wheels of: {' '.join(OF_DEEPSPEED)}", flush=True)
    return (
        f"on a machine with a network: {bring} {' '.join(lacking)}; here: python -m pip install wheels/*"
        if lacking
        else None
    )


def _installed(name: str) -> str:
    """Return the version of a package; empty if it is not installed."""
    return installed_version(name).replace("not installed", "")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()]


def part(name: str, options: Any, left: float) -> Outcome:
    """Run one part in a process of its own; ``left`` is how many seconds there are for it and the rest."""
    wanted = QUICK_SECONDS if options.is_quick else SECONDS[name]
    if name == "study":
        if not options.study_seconds:
            return Outcome("not run: --study SECONDS asks for it")
        wanted = min(options.study_seconds, left - 15)
    if left < 15 or wanted <= 0:
        return Outcome("not run: no time left")
    wanted = min(wanted, left - 10)
    outcome, started = Outcome(), time.monotonic()

    def take(line: Any) -> None:
        outcome.lines.append(dataclasses.asdict(line))
        print(line, flush=True)

    limit = left if options.is_quick else min(left, 2 * wanted + 60)
    _, problem = in_a_fork(_functions()[name], options, limit, seconds=wanted, print_line=take)
    outcome.status, outcome.seconds = problem or "done", round(time.monotonic() - started, 1)
    return outcome


def _functions() -> dict[str, Callable[..., Any]]:
    from benchmarks.gpu import evaluation, feed, masks, processes, speed, structures, study

    return {
        "masks": masks.masks,
        "step": speed.step,
        "waits": speed.waits,
        "update": speed.update,
        "ranks": processes.ranks,
        "feed": feed.feed,
        "resume": processes.resume,
        "evaluation": evaluation.evaluation,
        "compile": speed.compiled,
        "structures": structures.structures,
        "deepspeed": speed.deepspeed,
        "study": study.study,
    }


def describe(options: Any, report: Any) -> dict[str, str]:
    """Return what this machine is; raises SystemExit if it has no GPU that can be used."""
    import torch

    from pipeline.distributed.device import choose

    if options.device == "cuda":
        found = choose("auto" if torch.cuda.is_available() else "cuda", 0)
        if found.problem:
            raise SystemExit(f"no CUDA device found; --device cpu --quick tests that the code runs ({found.problem})")
    else:
        found = choose("cpu", 0)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=_root())
    return {
        "device": f"{options.device} {found.name}",
        "software": found.software,
        "commit": commit.stdout.strip() or "unknown",
        "model": options.model,
    }


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


def in_a_fork(
    work: Callable[..., Any],
    options: Any,
    limit: float,
    *,
    seconds: float = 0.0,
    print_line: Callable[[Any], None],
) -> tuple[list[Any], str]:
    """Call ``work(options, report)`` in a fork, which alone uses the device, and take its lines as they come.

    A crash of one part, or what it leaves in the GPU's memory, does not reach the next.

    Returns:
        What ``work`` has returned, in a list; and the part's status if it is not done.
    """
    import multiprocessing

    import torch  # before the fork, so that it is imported once; nothing here may touch CUDA

    from benchmarks.gpu.report import Line, NotRunError, Report

    if options.device == "cpu":
        import torch._dynamo  # the optimiser's first step would, in every process

    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)

    def body() -> None:
        os.setsid()  # so that its own processes can be ended with it
        torch.set_num_threads(options.threads)
        if options.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        try:
            theirs.send(("result", work(options, Report(theirs.send, seconds, is_quick=options.is_quick))))
        except NotRunError as error:
            theirs.send(("status", f"not run: {error}"))
        except SystemExit as error:
            theirs.send(("status", str(error)))
        except BaseException as error:
            traceback.print_exc()
            theirs.send(("status", f"failed: {type(error).__name__}: {str(error).strip()[:300]}"))
        theirs.close()
        sys.stdout.flush()
        os._exit(0)

    process = context.Process(target=body)
    process.start()
    theirs.close()
    deadline, results, status = time.monotonic() + limit, [], ""
    try:
        while True:
            if not mine.poll(max(0.0, deadline - time.monotonic())):
                status = f"not run to its end: stopped after {limit:.0f} s"
                break
            found = mine.recv()
            if isinstance(found, Line):
                print_line(found)
            elif found[0] == "result":
                results.append(found[1])
            else:
                status = found[1]
    except EOFError:
        process.join(10)
        if not results and not status:
            status = f"failed: its process ended with {process.exitcode}"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    return results, status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    parts: Sequence[str] = tuple(SECONDS)
    add("--only", nargs="+", choices=parts, default=parts, metavar="PART", help="only these parts (default: all)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="what to accept (default: cuda)")
    add("--quick", action="store_true", help="small networks and few rounds, only to test that the code runs")
    add("--minutes", type=float, default=9.0, metavar="N", help="time for all parts (default: 9)")
    add("--threads", type=int, default=1, metavar="N", help="torch threads on the CPU (default: 1)")
    add("--model", metavar="NAME", help="network of the parts that measure time (default: resnet50)")
    add(
        "--study", type=float, default=0.0, metavar="SECONDS", help="time for runs of the study's cells (default: none)"
    )
    add("--pack", type=local_path, metavar="FILE", help="images and labels of the study")
    add(
        "--json", type=local_path, default=Path("gpu.json"), metavar="FILE", help="where results go (default: gpu.json)"
    )
    return parser


if __name__ == "__main__":
    leave(main())
