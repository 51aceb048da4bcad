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
start     seconds until the first output, without and with the cache
other     dense bf16 and int8, for information

Legs run in turn in one process. Times are CPU time of the process, but for I8; the load of the machine is
printed. Ends with an error only on a wrong result: logits that are not torch's to 1e-4 of the largest.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.support.bars import Bar, Bounds, Figure, Options, Results, bar, options
from benchmarks.support.dense_engines import (
    INSTALL,
    Engine,
    Images,
    capped_environment,
    dense_engines,
    is_capped,
    missing,
)
from benchmarks.support.samples import network_ticket
from pipeline.inference import SparseEnsemble, SparseNetwork
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
started = time.process_time()
from pipeline.inference import SparseNetwork
SparseNetwork(sys.argv[1])(images)
print(time.process_time() - started)
"""
PARTS = (*BOUNDS, "memory", "start", "other")
DEMO = ("cifar_resnet8", {"width": 32, "stem_stride": 2}, 28)
COMPILED = ("I1", "I6")  # parts with torch.compile, which takes minutes to compile
TOLERANCE = 1e-4
MIN_WALL_ROUNDS = 20


def main() -> None:
    given = options(__doc__, PARTS, models=("resnet50",), quick_model="cifar_resnet20")
    results = Results()
    print(f"{processor()}; {load()}; {given.threads} thread(s)", flush=True)
    if absent := missing():
        print(f"not installed, and left out: {', '.join(absent)}; do: {INSTALL}", flush=True)
    for part in given.only:
        PART[part](part, given, results)
    print(load(), flush=True)
    results.write(given.json)


def processor() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    known = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_fp16", "amx_int8") if f" {flag}" in flags]
    return f"{names[0] if names else 'unknown processor'} ({', '.join(known)})"


def load() -> str:
    return "load " + " ".join(f"{number:.1f}" for number in os.getloadavg())


# -- what is measured


def sparse(ticket: Ticket, *, threads: int = 1) -> SparseNetwork:
    """Open a ticket, with vectors of AVX2 in a process whose engines are kept to it."""
    return SparseNetwork(ticket, threads=threads, lanes=8 if is_capped() else 0)


def engines_for(part: str, model: nn.Module, images: Images, given: Options) -> dict[str, Engine]:
    with_compile = part in COMPILED and not given.is_quick and not is_capped()
    engines = dict(dense_engines(model, images.shape, threads=1, with_compile=with_compile))
    if is_capped():
        engines.pop("ONNX Runtime", None)
    return engines


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


def cpu_ms(leg: Callable[[], object]) -> float:
    started = time.process_time()
    leg()
    return 1000 * (time.process_time() - started)


def times(
    legs: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[Callable[[], object]], float]
) -> dict[str, list[float]]:
    """Time legs in turn, after one round that is not counted; the order changes from round to round."""
    found: dict[str, list[float]] = {name: [] for name in legs}
    names = list(legs)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            milliseconds = clock(legs[name])
            if number:
                found[name].append(milliseconds)
    return found


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
        found = times(legs, given.rounds, cpu_ms)
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

    def wall_ms(leg: Callable[[], object]) -> float:
        started = time.perf_counter()
        leg()
        return 1000 * (time.perf_counter() - started)

    found = times(legs, max(MIN_WALL_ROUNDS, given.rounds * given.runs), wall_ms)
    one, two = min(found["1"]), min(found["2"])
    ratios = [a / b for a, b in zip(found["1"], found["2"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    results.add(Bar(part, one / two, low, high, BOUNDS[part], one, two, (one / two,)))


def memory(part: str, given: Options, results: Results) -> None:
    for kind in ("uniform", "erk"):
        _, ticket = sample(given, distribution=kind)
        network = sparse(ticket)
        loaded, file = network.num_bytes, len(encode(ticket))
        text = f"{loaded / file:.2f} × its file ({loaded / 1e6:.1f} / {file / 1e6:.1f} MB); must be ≤ 1.8"
        results.add(Figure(f"{part} {kind}", text, {"loaded": loaded, "file": file}))


def start(part: str, given: Options, results: Results) -> None:
    _, ticket = sample(given)
    images = images_for(ticket, 1)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TICKETWORKS_CACHE"], kept = folder, os.environ.get("TICKETWORKS_CACHE")
        try:
            path = Path(folder) / "ticket.safetensors"
            path.write_bytes(encode(ticket))
            for _ in range(2):
                done = subprocess.run(
                    [sys.executable, "-c", START, str(path), str(images.shape[-1])],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                seconds.append(float(done.stdout))
        finally:
            os.environ.pop("TICKETWORKS_CACHE")
            if kept is not None:
                os.environ["TICKETWORKS_CACHE"] = kept
    text = f"{seconds[0]:.1f} s of CPU time to the first output, must be ≤ 60; cached {seconds[1]:.1f}, must be ≤ 2"
    results.add(Figure(part, text, {"first": seconds[0], "cached": seconds[1]}))


def other_precisions(part: str, given: Options, results: Results) -> None:
    model, ticket = sample(given)
    images = images_for(ticket, 1)
    engines = dict(dense_engines(model, images.shape, threads=1, precisions=("bf16", "int8")))
    legs = {name: partial(engine, images) for name, engine in engines.items()}
    network = sparse(ticket)
    found = times({**legs, "ours": lambda: network(images)}, given.rounds, cpu_ms)
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
