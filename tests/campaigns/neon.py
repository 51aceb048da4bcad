"""Run sparse inference's NEON kernels on an emulated 64-bit ARM: ``python -m tests.campaigns.neon``.

The kernels are compiled for a few ARM processors, linked with ``neon_harness.c`` and run by Debian's
qemu-user: networks of random layers (``tests/inference/random_networks.py``), small residual networks,
one of depthwise convolutions, one of linear layers. Every second program runs on two threads, and each
layer in a way that is drawn from all that the tuner may choose. Logits must be torch's in float64, to 1e-4 of
the largest one. What an emulator cannot show: speed, and the order in which ARM's cores see each other's
writes.
"""

from __future__ import annotations

import copy
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.support.samples import network_ticket
from pipeline.command_line import ArgumentParser, run_to_end, whole_number
from pipeline.errors import ServiceError
from pipeline.inference import records
from pipeline.inference.expand import expand
from pipeline.inference.graph import Operation
from pipeline.inference.jit import NEON, Code, Processor, object_file
from pipeline.inference.kernel_set import LINEAR_GROUPS, Library, inner_ir, plain_ir
from pipeline.inference.kernels import tile_name, tile_sizes
from pipeline.inference.layout import LINE, round_up
from pipeline.inference.lower import lower
from pipeline.inference.program import Program
from pipeline.inference.trace import list_operators
from pipeline.inference.tune import allowed
from tests.inference.random_networks import in_float64, random_network

TOLERANCE = 1e-4
GCC, NM, QEMU = "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-nm", ("qemu-aarch64", "qemu-aarch64-static")
MISSING = ServiceError(
    f"{GCC}, {NM} or {QEMU[0]} is missing",
    do="apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user",
)
# what LLVM compiles for, and what qemu emulates: ARMv8.0; ARMv8.2, whose atomics are instructions; one with SVE
PROCESSORS = {"cortex-a72": "cortex-a72", "neoverse-n1": "neoverse-n1", "neoverse-v1": "max"}
NETWORKS: tuple[tuple[str, int, dict[str, Any], float], ...] = (
    ("cifar_resnet8", 16, {"width": 4}, 0.5),
    ("cifar_resnet8", 28, {"width": 4, "stem_stride": 2}, 0.1),
    ("mobilenet_v2", 32, {"width_mult": 0.1}, 0.5),
)
# fields of records
ADDRESSES = ("entries", "bases", "counts", "order", "bias", "mask", "table", "shares", "scale", "shift")


@dataclass
class Case:
    """A program, images, and the logits that torch gives for them."""

    name: str
    program: Program
    images: Tensor
    expected: Tensor

    @property
    def kernels(self) -> Iterator[str]:
        """Names of the tiles, linear kernels and others that the program calls."""
        layers = {layer.number: layer for layer in self.program.layers}
        for number, name in enumerate(self.program.kernels):
            if number not in layers:
                yield name
                continue
            layer, record = layers[number], self.program.records[number]
            if name == "linear":
                yield f"linear_{layer.choice.group}"
                continue
            size = int(record[records.CONVOLUTION["tile_vectors"]])
            is_narrow = bool(record[records.CONVOLUTION["vectors"]] % record[records.CONVOLUTION["tiles"]])
            assert layer.packed is not None
            for length in range(size - is_narrow, size + 1):
                yield tile_name(layer.choice.group, length, is_short=layer.packed.is_short)


def make_case(name: str, model: nn.Module, images: Tensor, masks: Mapping[str, Tensor], *, threads: int) -> Case:
    """Prepare a network as ``build_engine`` does, but for vectors of NEON."""
    expected = in_float64(model, images)
    channels, height, width = images.shape[1:]
    state = model.state_dict()
    listing = list_operators(copy.deepcopy(model).to("meta"), (channels, height, width))
    program = Program(expand(lower(listing, state, masks)), state, masks, width=NEON, threads=threads)
    assert all(isinstance(step, Operation) for step in program.expanded.steps), f"{name}: torch computes a part"
    return Case(f"{name}, {threads} threads", program, images, expected)


def cases(num_random: int) -> Iterator[Case]:
    """Yield all cases: the networks that are named, and random ones."""
    torch.manual_seed(0)
    perceptron = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 64), nn.GELU(), nn.Linear(64, 33), nn.ReLU())
    for threads in (1, 2):
        for name, side, args, density in NETWORKS:
            model, ticket = network_ticket(name, args=args, num_classes=10, resolution=side, density=density)
            images = torch.randn(2, 3, side, side)
            yield make_case(f"{name} {args} at {side} pixels", model, images, ticket.masks, threads=threads)
        yield make_case("linear layers", perceptron, torch.randn(2, 3, 12, 12), {}, threads=threads)
    for seed in range(num_random):
        model, images, text = random_network(seed)
        yield make_case(text, model, images, {}, threads=1 + seed % 2)


def link(case: Case, addresses: Mapping[str, int], seed: int) -> None:
    """Give the program the addresses of its code, and draw a way for each layer."""
    draw, code = random.Random(seed), Code(None, dict(addresses))
    case.program.link(Library(code, code))
    for layer in case.program.layers:
        ways = sorted(allowed(case.program, layer), key=lambda way: (way.group, way.vectors, way.blocks))
        case.program.choose(layer, draw.choice(ways))
    case.program.seal()


def write(case: Case, path: Path) -> None:
    """Write the program with all that its records point to, as ``neon_harness.c`` reads it."""
    program, memory, place_of = case.program, bytearray(), {}
    packed = [layer.packed for layer in program.layers if layer.packed is not None]
    pointed = [array for each in packed for array in (each.entries, each.bases, each.counts, each.order)]
    pointed += [layer.bias for layer in program.layers]
    pointed += [*program._kept, *(mask for mask in program._masks.values() if mask is not None)]

    def put(array: Any) -> int:
        memory.extend(bytes(round_up(len(memory), 4 * LINE) - len(memory)))
        memory.extend(array.tobytes())
        return len(memory) - array.nbytes

    for array in pointed:
        place_of[int(array.ctypes.data)] = put(array)
    rows, relative = program.records.copy(), []
    for number, name in enumerate(program.kernels):
        for field, column in _fields(name).items():
            if field in ADDRESSES and rows[number, column]:
                rows[number, column] = place_of[int(rows[number, column])]
                relative.append((number * records.RECORD_FIELDS + column) * 8)
    at_records = put(rows)
    at_images = put(case.images.numpy())
    numbers = (len(memory), len(relative), at_records, len(rows), program.arena_floats + LINE, at_images)
    shapes = (len(case.images), case.images[0].numel(), case.expected[0].numel(), program.threads)
    places = [at_records + place for place in relative]
    path.write_bytes(struct.pack(f"<{10 + len(places)}q", *numbers, *shapes, *places) + memory)


def _fields(kernel: str) -> dict[str, int]:
    known = {"convolution": records.CONVOLUTION, "linear": records.LINEAR, "copy": records.COPY, "mean": records.MEAN}
    known |= {"max": records.POOL, "average": records.POOL, "add": records.ADD}
    return known.get(kernel.partition("_")[0], records.POINTWISE)


def build(processor: Processor, needed: set[str], folder: Path) -> tuple[Path, dict[str, int]]:
    """Compile and link all kernels; returns the program for qemu, and the addresses of its functions."""
    runner = folder / f"run-{processor.name}"
    objects = [folder / "inner.o", folder / "plain.o"]
    objects[0].write_bytes(object_file(inner_ir(processor), processor, is_optimized=False))
    objects[1].write_bytes(object_file(plain_ir(processor, needed), processor, is_optimized=True))
    harness = Path(__file__).with_name("neon_harness.c")
    command = [GCC, "-O1", "-Wall", "-static", "-no-pie", "-pthread", "-o", runner, harness, *objects]
    subprocess.run(command, check=True)
    lines = subprocess.check_output([NM, runner], text=True).splitlines()
    return runner, {name: int(place, 16) for place, kind, name in map(str.split, lines) if kind == "T"}


def compare(processor: Processor, qemu: Sequence[str], num_random: int, folder: Path) -> tuple[int, str]:
    """Run all networks on one processor; returns how many disagree with torch, and what to print."""
    found = list(cases(num_random))
    runner, addresses = build(processor, set().union(*(case.program.needed for case in found)), folder)
    paths = [folder / str(number) for number in range(len(found))]
    for number, (case, path) in enumerate(zip(found, paths, strict=True)):
        link(case, addresses, number)
        write(case, path)
    ended = subprocess.run([*qemu, runner, *paths], capture_output=True, text=True)
    worst, bad = 0.0, []
    for case, path in zip(found, paths, strict=True):
        output = path.with_suffix(".out")
        if not output.exists():
            return 1, f"{case.name}: ended with {ended.returncode}: {ended.stderr.strip()}"
        logits = torch.from_numpy(np.fromfile(output, np.float32)).reshape(case.expected.shape)
        output.unlink()
        difference = float((logits - case.expected).abs().max() / case.expected.abs().max().clamp_min(1e-6))
        worst = max(worst, difference)
        if not difference <= TOLERANCE:
            bad.append(f"logits differ by {difference:.1e} of the largest: {case.name}\n")
    used = {kernel for case in found for kernel in case.kernels}
    tiles = {
        tile_name(group, size, is_short=is_short)
        for group, sizes in tile_sizes(NEON).items()
        for size in sizes
        for is_short in (False, True)
        if group == 1 or not is_short
    }
    linear = {f"linear_{group}" for group in LINEAR_GROUPS}
    return len(bad), (
        f"{''.join(bad)}{len(found) - len(bad)} of {len(found)} networks agree with torch; the largest difference is "
        f"{worst:.1e} of the largest logit; run: {len(used & tiles)} of {len(tiles)} tiles, "
        f"{len(used & linear)} of {len(linear)} linear kernels, {len(used - tiles - linear)} others"
    )


def run(arguments: Sequence[str] | None) -> int:
    """Compare on every processor."""
    parser = ArgumentParser(prog="python -m tests.campaigns.neon", description=str(__doc__), allow_abbrev=False)
    help_random = "how many random networks, beside eight others (default: 200)"
    parser.add_argument("--random", type=whole_number(0, 10_000), default=200, metavar="N", help=help_random)
    help_processors = f"which to compile for (default: {' '.join(PROCESSORS)})"
    parser.add_argument("--processors", nargs="+", choices=PROCESSORS, default=list(PROCESSORS), help=help_processors)
    given = parser.parse_args(arguments)
    qemu = next(filter(None, map(shutil.which, QEMU)), None)
    if qemu is None or not (shutil.which(GCC) and shutil.which(NM)):
        raise MISSING
    torch.set_num_threads(1)
    num_bad = 0
    for name in given.processors:
        processor = Processor("aarch64-unknown-linux-gnu", name, "", NEON)
        with tempfile.TemporaryDirectory(prefix="neon-") as folder:
            bad, text = compare(processor, [qemu, "-cpu", PROCESSORS[name]], given.random, Path(folder))
        print(f"{name}: {text}", flush=True)
        num_bad += bad
    return int(num_bad > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    return run_to_end(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
