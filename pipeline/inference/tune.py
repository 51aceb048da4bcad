"""Measure how each layer runs fastest on this machine, and remember it.

Layers of equal shape and density share their measurement. Times are CPU time of this thread, so that
other processes disturb them little.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

from pipeline.files import parse_json
from pipeline.inference import cache
from pipeline.inference.kernel_set import LINEAR_GROUPS, version
from pipeline.inference.kernels import tile_sizes
from pipeline.inference.pack import Packed, may_group
from pipeline.inference.program import Choice, Layer, Program

ROUNDS = 5  # of which the shortest counts
BLOCKS = (1, 2, 4, 8, 16)
# Rows may be computed together if at least this share of the weights in their entries is active: with fewer,
# the packed weights would take more than 9.5 bytes each.
MIN_SHARE = {2: 0.63, 4: 0.53, 8: 0.47}

Run = Callable[[int], None]  # run the record of this number


def tune(program: Program, run: Run, *, key: str) -> None:
    """Choose how every layer runs: as the cache says, or as measured now.

    Args:
        program: whose choices are set.
        run: runs one record of it, with all memory that it needs.
        key: of the processor, the ticket, the image size and the threads.
    """
    name = f"tuning-{key}-{version()}"
    known = _read(name, len(program.layers))
    if known is not None:
        for layer, choice in zip(program.layers, known, strict=True):
            if choice not in allowed(program, layer):
                break  # it is of other kernels
            program.choose(layer, choice)
        else:
            return
    measured: dict[tuple[object, ...], Choice] = {}
    for layer in program.layers:
        alike = _kind(program, layer)
        if alike in measured:
            program.choose(layer, measured[alike])
        else:
            measured[alike] = _fastest(program, layer, run)
    choices = [[layer.choice.group, layer.choice.vectors, layer.choice.blocks] for layer in program.layers]
    cache.save(name, json.dumps(choices).encode())


def allowed(program: Program, layer: Layer) -> set[Choice]:
    """Return every way in which a layer can run."""
    weights = layer.weights
    if layer.step.is_vector:
        return {Choice(group, 1, 1) for group in LINEAR_GROUPS if may_group(weights, group, is_rounded_up=True)}
    vectors = program.layouts[layer.step.output].vectors
    return {
        Choice(group, size, blocks)
        for group, sizes in tile_sizes(program.width).items()
        if may_group(weights, group)
        for size in sizes
        if size <= program.longest_tile(vectors)
        for blocks in BLOCKS
        if blocks == 1 or weights.groups == 1
    }


def _read(name: str, num_layers: int) -> list[Choice] | None:
    content = cache.load(name)
    if content is None:
        return None
    try:
        rows = parse_json(content)
    except ValueError:
        return None
    if not isinstance(rows, list) or len(rows) != num_layers:
        return None
    if not all(isinstance(row, list) and len(row) == 3 and all(type(n) is int for n in row) for row in rows):
        return None
    return [Choice(*row) for row in rows]


def _kind(program: Program, layer: Layer) -> tuple[object, ...]:
    weights, step = layer.weights, layer.step
    source, output = program.layouts[step.source], program.layouts[step.output]
    sizes = (weights.num_outputs, weights.num_inputs, weights.groups, layer.offsets.shape[1])
    places = (source.row, source.stride, output.vectors, output.is_clean, step.layer.other is None)
    return (*sizes, *places, round(20 * weights.density), _share(layer, 4) > 2 * weights.density)


def _share(layer: Layer, group: int) -> float:
    """Estimate which share of the numbers in entries for ``group`` rows is active, from some of the rows."""
    weights = layer.weights
    some = weights.outputs < 64
    key = (weights.outputs[some] // group * weights.num_inputs + weights.inputs[some]) * layer.offsets.shape[1]
    entries = len(set((key + weights.taps[some]).tolist()))
    return float(some.sum()) / max(1, entries * group)


def _fastest(program: Program, layer: Layer, run: Run) -> Choice:
    best, shortest = (layer.choice, layer.packed), float("inf")
    packed: dict[tuple[int, int], Packed] = {}
    can = allowed(program, layer)

    def measure(choice: Choice) -> float:
        nonlocal best, shortest
        if choice not in can:
            return float("inf")
        form = (choice.group, choice.blocks)
        if form not in packed:
            packed[form] = layer.pack(*form)
        program.choose(layer, choice, packed[form])
        seconds = _seconds(lambda: run(layer.number))
        if seconds < shortest:
            best, shortest = (choice, packed[form]), seconds
        return seconds

    for group in {choice.group for choice in can}:
        if group > 1 and _share(layer, group) < MIN_SHARE[group]:
            continue
        if layer.step.is_vector:
            measure(Choice(group, 1, 1))
            continue
        sizes = sorted({choice.vectors for choice in can if choice.group == group})
        widest = sizes[-1]
        blocks = min(BLOCKS, key=lambda number: measure(Choice(group, widest, number)))
        for size in _tried(sizes, program.layouts[layer.step.output].vectors):
            measure(Choice(group, size, blocks))
            if blocks > 1:
                measure(Choice(group, size, blocks // 2))
    program.choose(layer, *best)
    return layer.choice


def _tried(sizes: list[int], vectors: int) -> Iterator[int]:
    """Tile sizes that cut the plane differently, without the largest."""
    seen = {-(-vectors // -(-vectors // sizes[-1]))}
    for size in reversed(sizes[:-1]):
        even = -(-vectors // -(-vectors // size))
        if even not in seen and 2 * even >= sizes[-1]:
            seen.add(even)
            yield size


def _seconds(work: Callable[[], None]) -> float:
    times = []
    for _ in range(ROUNDS):
        started = time.thread_time_ns()
        work()
        times.append(time.thread_time_ns() - started)
    return min(times) / 1e9
