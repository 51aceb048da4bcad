"""Measure sparse inference on this CPU beside dense engines, on tickets with random weights and masks.

``python -m benchmarks.inference``

ResNet-50 at 224 px in fp32, 90% sparse, one thread; a ratio is the time of the best dense engine of the
same run (torch, ONNX Runtime, OpenVINO, and in I1 and I6 torch.compile) over ours. Parts, for ``--only``:

I1        uniform density, batch 1
I2        ERK, batch 1
I3        blocks of 4 outputs × 1 input, batch 1
I4        uniform density, batch 32
I5        two uniform tickets as an ensemble over one dense run, batch 1
I6        the demo's network (cifar_resnet8, 28 px, ERK), batch 1, and batch 256 for information
I7        as I1, all engines kept to AVX2; ONNX Runtime, which cannot be, is left out
I8        two threads over one, batch 1: wall time, ratio of minima
memory    bytes of a loaded ticket over those of its file
start     seconds of the first call, without and with the cache
other     dense bf16 and int8, for information

Legs run in turn in one process. Times are CPU time of the process, but for I8; the load of the machine is
printed. Ends with an error only on a wrong result: logits that are not torch's to 1e-4 of the largest.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.support.bars import Bar, Bounds, Figure, Options, Results, bar, options
from benchmarks.support.samples import network_ticket
from pipeline.inference import SparseEnsemble, SparseNetwork
from pipeline.inference.dense_engines import INSTALL, Engine, Images, dense_engines, missing
from pipeline.inference.timing import cpu_ms, describe_load, describe_processor, in_turns, wall_ms
from pipeline.tickets.format import Ticket, encode

BOUNDS = {
    "I1": Bounds("≥ 2.2", "3.5"),
    "I2": Bounds("≥ 1.5", "2.2"),
    "I3": Bounds("≥ 2.8", "4.5"),
    "I4": Bounds("≥ 2.2", "3"),
    "I5": Bounds("≥ 1.1", "1.7"),
    "I6": Bounds("≥ 1.3", "3"),
    "I7": Bounds("≥ 2.5", "3.5"),
    "I8": Bounds("≥ 1.5", "1.85"),
}
START = """
import sys, time
import numpy, torch
images = numpy.zeros((1, 3, int(sys.argv[2]), int(sys.argv[2])), numpy.float32)
times = [time.process_time()]
from pipeline.inference import SparseNetwork
network = SparseNetwork(sys.argv[1])
times.append(time.process_time())
network(images)
times.append(time.process_time())
print(times[1] - times[0], times[2] - times[1])
"""
RESIDENT = """
import ctypes, gc, os, sys
import numpy, torch, torchvision
from pipeline.inference import SparseNetwork

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")

def opened(path, side):
    network = SparseNetwork(path)
    network(numpy.zeros((1, 3, side, side), numpy.float32))
    network.engine((3, side, side)).drop_activations()
    return network

small = opened(sys.argv[3], 32)
before = resident()
large = opened(sys.argv[1], int(sys.argv[2]))
print(resident() - before)
"""
PARTS = (*BOUNDS, "memory", "start", "other")
DEMO = ("cifar_resnet8", {"width": 32, "stem_stride": 2}, 28)
COMPILED = ("I1", "I6")  # parts with torch.compile, which takes minutes to compile
TOLERANCE = 1e-4
MIN_WALL_ROUNDS = 20


def main() -> None:
    given = options(__doc__, PARTS, models=("resnet50",), quick_model="cifar_resnet20")
    results = Results()
    print(f"{describe_processor()}; {describe_load()}; {given.threads} thread(s)", flush=True)
    if absent := missing():
        print(f"not installed, and left out: {', '.join(absent)}; do: {INSTALL}", flush=True)
    for part in given.only:
        PART[part](part, given, results)
    print(describe_load(), flush=True)
    results.write(given.json)


# -- what is measured


def sparse(ticket: Ticket, *, threads: int = 1) -> SparseNetwork:
    """Open a ticket, with vectors of AVX2 in a process whose engines are kept to it."""
    return SparseNetwork(ticket, threads=threads, lanes=8 if is_capped() else 0)


def capped_environment() -> dict[str, str]:
    """Variables that keep OpenVINO and torch to AVX2, for a process that is started with them."""
    return {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def is_capped() -> bool:
    """Whether this process was started so."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2"


def engines_for(part: str, model: nn.Module, images: Images, given: Options) -> dict[str, Engine]:
    with_compile = part in COMPILED and not given.is_quick and not is_capped()
    engines = opened(model, images, ("fp32",), with_compile=with_compile)
    if is_capped():
        engines.pop("ONNX Runtime", None)
    return engines


def opened(
    model: nn.Module, images: Images, precisions: tuple[str, ...], *, with_compile: bool = False
) -> dict[str, Engine]:
    with tempfile.TemporaryDirectory() as folder:
        found = dense_engines(
            model, images.shape, Path(folder), threads=1, precisions=precisions, with_compile=with_compile
        )
        return {
            engine.name if engine.precision == "fp32" else f"{engine.name} {engine.precision}": engine.open()
            for engine in found
        }


def sample(
    given: Options, *, distribution: str = "uniform", structure: str = "none", seed: int = 0
) -> tuple[nn.Module, Ticket]:
    name = given.models[0]
    resolution = 32 if given.is_quick else 224
    if structure != "none" and given.is_quick:
        name = "cifar_resnet8"
    return network_ticket(
        name, num_classes=1000, resolution=resolution, distribution=distribution, structure=structure, seed=seed
    )


def images_for(ticket: Ticket, batch: int) -> Images:
    side = ticket.provenance.preprocessing["eval_resolution"]
    return np.random.default_rng(0).standard_normal((batch, 3, side, side), np.float32)


def require_right(ours: Callable[[Images], Images], model: nn.Module, images: Images) -> None:
    """Compare with torch.

    Raises:
        AssertionError: the logits differ.
    """
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    error = float(np.abs(ours(images) - expected).max() / np.abs(expected).max())
    assert error <= TOLERANCE, f"logits differ by {error:.1e} of the largest"


def against_dense(
    name: str,
    ours: Callable[[Images], object],
    engines: Mapping[str, Callable[[Images], object]],
    images: Images,
    given: Options,
    results: Results,
    bounds: Bounds | None,
) -> None:
    """Add the ratio of the best dense engine to ours, and print all engines."""
    legs = {each: partial(engine, images) for each, engine in engines.items()} | {"ours": lambda: ours(images)}
    runs, best = [], ""
    for _ in range(given.runs):
        found = in_turns(legs, given.rounds, cpu_ms)
        medians = {each: statistics.median(values) for each, values in found.items()}
        best = min((each for each in medians if each != "ours"), key=medians.__getitem__)
        runs.append(list(zip(found[best], found["ours"], strict=True)))
        print(
            "  " + ", ".join(f"{each} {ms:.1f} ms" for each, ms in sorted(medians.items(), key=lambda i: i[1])),
            flush=True,
        )
    results.add(bar(name, runs, bounds))


# -- parts


def sparse_against_dense(part: str, given: Options, results: Results) -> None:
    kinds: dict[str, dict[str, Any]] = {"I2": {"distribution": "erk"}, "I3": {"structure": "block 4x1"}}
    model, ticket = sample(given, **kinds.get(part, {}))
    batch = 32 if part == "I4" and not given.is_quick else 1
    images = images_for(ticket, batch)
    network = sparse(ticket)
    require_right(network, model, images)
    ours: Callable[[Images], object] = network
    if part == "I5":
        ours = SparseEnsemble([network, sparse(sample(given, seed=1)[1])])
    engines = engines_for(part, model, images, given)
    against_dense(part, ours, engines, images, given, results, BOUNDS[part])


def demo(part: str, given: Options, results: Results) -> None:
    name, args, side = DEMO
    model, ticket = network_ticket(name, args=args, num_classes=10, resolution=side, distribution="erk")
    network = sparse(ticket)
    for batch, bounds in ((1, BOUNDS[part]), (256, None)):
        images = images_for(ticket, batch)
        require_right(network, model, images)
        engines = engines_for(part, model, images, given)
        against_dense(
            f"{part} batch {batch}",
            repeated(network, batch),
            {k: repeated(e, batch) for k, e in engines.items()},
            images,
            given,
            results,
            bounds,
        )


def repeated(run: Callable[[Images], object], batch: int) -> Callable[[Images], object]:
    """Run a short leg often enough for the clock."""
    count = 50 if batch == 1 else 1

    def leg(images: Images) -> None:
        for _ in range(count):
            run(images)

    return leg


def with_avx2(part: str, given: Options, results: Results) -> None:
    """Measure in a process that keeps to AVX2."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.inference",
            "--only",
            "I1",
            "--rounds",
            str(given.rounds),
            "--runs",
            str(given.runs),
        ]
        command += ["--json", str(path), *(["--quick"] if given.is_quick else [])]
        subprocess.run(command, env=capped_environment(), check=True, stdout=subprocess.DEVNULL)
        found = json.loads(path.read_text())["I1"]
    fields = {key: found[key] for key in ("value", "low", "high", "numerator_ms", "denominator_ms")}
    results.add(Bar(part, bounds=BOUNDS[part], runs=tuple(found["runs"]), **fields))


def two_threads(part: str, given: Options, results: Results) -> None:
    _, ticket = sample(given)
    images = images_for(ticket, 1)
    networks = {threads: sparse(ticket, threads=threads) for threads in (1, 2)}
    legs = {str(threads): partial(network, images) for threads, network in networks.items()}
    found = in_turns(legs, max(MIN_WALL_ROUNDS, given.rounds * given.runs), wall_ms)
    one, two = min(found["1"]), min(found["2"])
    ratios = [a / b for a, b in zip(found["1"], found["2"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    results.add(Bar(part, one / two, low, high, BOUNDS[part], one, two, (one / two,)))


def memory(part: str, given: Options, results: Results) -> None:
    for kind in ("uniform", "erk"):
        _, ticket = sample(given, distribution=kind)
        network = sparse(ticket)
        images = images_for(ticket, 1)
        with kept(ticket) as path:
            file = path.stat().st_size
            small = path.with_name("small.safetensors")
            small.write_bytes(encode(network_ticket("cifar_resnet8", num_classes=10, resolution=32)[1]))
            (grown,) = [numbers(RESIDENT, path, images, small) for _ in range(2)][1]  # tuned before
        text = (
            f"{grown / file:.2f} × its file ({grown / 1e6:.1f} / {file / 1e6:.1f} MB) resident beyond a process that "
            f"runs another ticket, without activations; packed {network.num_bytes / file:.2f}; must be ≤ 1.8"
        )
        results.add(Figure(f"{part} {kind}", text, {"resident": grown, "packed": network.num_bytes, "file": file}))


def start(part: str, given: Options, results: Results) -> None:
    _, ticket = sample(given)
    images = images_for(ticket, 1)
    with kept(ticket) as path:
        (opening, first), (_, cached) = (numbers(START, path, images) for _ in range(2))
    text = (
        f"{first:.1f} s of CPU time for the first call, must be ≤ 60; from the cache {cached:.1f}, must be ≤ 2; "
        f"opening the ticket {opening:.1f} before, with the import of torchvision"
    )
    results.add(Figure(part, text, {"opening": opening, "first": first, "cached": cached}))


@contextlib.contextmanager
def kept(ticket: Ticket) -> Iterator[Path]:
    """Write a ticket into a folder in which processes also keep an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ticket.safetensors"
        path.write_bytes(encode(ticket))
        yield path


def numbers(code: str, path: Path, images: Images, *more: Path) -> list[float]:
    """Run code in a process of its own and return the numbers that it prints."""
    command = [sys.executable, "-c", code, str(path), str(images.shape[-1]), *map(str, more)]
    environ = os.environ | {"TICKETWORKS_CACHE": str(path.parent)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


def other_precisions(part: str, given: Options, results: Results) -> None:
    model, ticket = sample(given)
    images = images_for(ticket, 1)
    engines = opened(model, images, ("bf16", "int8"))
    legs = {name: partial(engine, images) for name, engine in engines.items()}
    network = sparse(ticket)
    found = in_turns({**legs, "ours": lambda: network(images)}, given.rounds, cpu_ms)
    medians = {name: statistics.median(values) for name, values in found.items()}
    results.add(Figure(part, ", ".join(f"{name} {ms:.1f} ms" for name, ms in medians.items()), medians))


PART: dict[str, Callable[[str, Options, Results], None]] = {
    **dict.fromkeys(("I1", "I2", "I3", "I4", "I5"), sparse_against_dense),
    "I6": demo,
    "I7": with_avx2,
    "I8": two_threads,
    "memory": memory,
    "start": start,
    "other": other_precisions,
}

if __name__ == "__main__":
    main()
