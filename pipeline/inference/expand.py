"""From a graph to steps that the kernels run: phase planes for strides, copies in and out of vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.inference.graph import Clamped, Convolution, Copy, Graph, Operation, Planes, Step, ToTorch


@dataclass(eq=False)
class Phases(Operation):
    """The copy of planes in which rows and columns of one remainder, modulo the strides, become planes.

    Phase number p of channel c becomes plane c · phases + p.
    """

    stride: tuple[int, int] = (1, 1)
    remainders: list[tuple[int, int]] = field(default_factory=list)


@dataclass(eq=False)
class Taps(Operation):
    """A convolution whose source has phase planes: where each tap of its kernel reads."""

    layer: Convolution = field(default_factory=lambda: Convolution("", Planes(0), Planes(0)))
    # for each tap (row, column) of the kernel: number of the phase, rows and columns from the output's pixel
    taps: dict[tuple[int, int], tuple[int, int, int]] = field(default_factory=dict)
    num_phases: int = 1
    is_vector: bool = False  # a linear layer of numbers, which lie one after the other

    def inputs(self) -> Iterator[Planes]:
        """The planes that the step reads."""
        yield self.source
        if self.layer.other is not None:
            yield self.layer.other


@dataclass(eq=False)
class Output(Operation):
    """The copy of planes to where the caller wants the network's output."""


@dataclass(frozen=True)
class Expanded:
    """The steps, and which planes are vectors whose numbers lie one after the other."""

    image: Planes
    steps: list[Step]
    compact: set[Planes]


def expand(graph: Graph) -> Expanded:
    """Give every step the planes that its kernel reads and writes."""
    steps: list[Step] = []
    loose: set[Planes] = set()  # planes of one pixel that are stored like larger ones
    phases: dict[Any, Planes] = {}
    everything: set[Planes] = set()
    for step in _with_stored_image(graph):
        if isinstance(step, Convolution):
            steps += _convolution(step, loose, phases)
        else:
            steps.append(step)
    for step in steps:
        if isinstance(step, Operation):
            everything |= {*step.inputs(), step.output}
        elif hasattr(step, "source" if isinstance(step, ToTorch) else "output"):
            everything.add(step.source if isinstance(step, ToTorch) else step.output)  # type: ignore[union-attr]
    last = steps[-1]
    if isinstance(last, ToTorch) and last.value == graph.output and not last.is_tokens:
        steps[-1] = Output("output", last.source, last.source)
    everything.discard(graph.image)
    return Expanded(graph.image, steps, {planes for planes in everything if planes.is_vector and planes not in loose})


def _with_stored_image(graph: Graph) -> Iterator[Step]:
    """Copy the image into planes, unless only phase planes are made of it; an image of one pixel has none."""
    stored = Planes(graph.image.channels, graph.image.height, graph.image.width)
    is_read = False
    changed: list[Step] = []
    for step in graph.steps:
        is_phased = isinstance(step, Convolution) and step.stride != (1, 1) and not graph.image.is_vector
        if isinstance(step, Operation):
            if step.source is graph.image and not is_phased:
                step.source, is_read = stored, True
            if isinstance(step, Clamped) and step.other is graph.image:
                step.other, is_read = stored, True
        changed.append(step)
    if is_read:
        yield Phases("image", graph.image, stored, (1, 1), [(0, 0)])
    yield from changed


def _convolution(layer: Convolution, loose: set[Planes], phases: dict[Any, Planes]) -> Iterator[Step]:
    source, output = layer.source, layer.output
    if source.is_vector and not output.is_vector:
        source = Planes(source.channels)
        loose.add(source)
        yield Copy("spread", layer.source, source)
    spots = {
        (i, j): (i * layer.dilation[0] - layer.padding[0], j * layer.dilation[1] - layer.padding[1])
        for i in range(layer.kernel[0])
        for j in range(layer.kernel[1])
    }
    # taps that only ever read padding are left out
    reached = {tap: spot for tap, spot in spots.items() if _is_inside(spot, source, output, layer.stride)}
    if not reached:
        reached = dict(list(spots.items())[:1])
    if source.is_vector and output.is_vector and source not in loose:
        taps = {tap: (0, 0, 0) for tap in reached if spots[tap] == (0, 0)}
        yield Taps(layer.name, source, output, layer, taps, is_vector=True)
        return
    (down, across), taps = layer.stride, {}
    remainders = sorted({(i % down, j % across) for i, j in reached.values()})
    for tap, (i, j) in reached.items():
        taps[tap] = (remainders.index((i % down, j % across)), i // down, j // across)
    if layer.stride != (1, 1):
        key = (source, layer.stride, tuple(remainders))
        if key not in phases:
            height, width = (
                -(-size // step) for size, step in zip((source.height, source.width), layer.stride, strict=True)
            )
            phases[key] = Planes(source.channels * len(remainders), height, width)
            if phases[key].is_vector:
                loose.add(phases[key])
            yield Phases("phases", source, phases[key], layer.stride, remainders)
        source = phases[key]
    if not output.is_vector:
        yield Taps(layer.name, source, output, layer, taps, len(remainders))
        return
    spread = Planes(output.channels)
    loose.add(spread)
    yield Taps(layer.name, source, spread, layer, taps, len(remainders))
    yield Copy("gather", spread, output, is_flattened=True)


def _is_inside(spot: tuple[int, int], source: Planes, output: Planes, stride: tuple[int, int]) -> bool:
    sizes = (source.height, output.height), (source.width, output.width)
    return all(
        start < size and (outputs - 1) * step + start >= 0
        for start, (size, outputs), step in zip(spot, sizes, stride, strict=True)
    )
