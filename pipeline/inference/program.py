"""A network as records for the compiled code: layouts, packed weights, masks."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.inference.emit import Width
from pipeline.inference.expand import Expanded, Output, Phases, Taps
from pipeline.inference.graph import Add, Copy, FromTorch, Mean, Operation, Planes, Pointwise, Pool, ToTorch
from pipeline.inference.kernel_set import LINEAR_GROUPS, Library
from pipeline.inference.kernels import tile_name, tile_sizes
from pipeline.inference.layout import Layout, Needs, Rows, Use, mask_of, place_all
from pipeline.inference.pack import Packed, Weights, active_weights, gathered, may_group, pack
from pipeline.inference.records import (
    ADD,
    CODE,
    CONVOLUTION,
    COPY,
    LINEAR,
    MEAN,
    NUM_TASKS,
    POINTWISE,
    POOL,
    RECORD_FIELDS,
)

CACHE_FLOATS = 6144  # of input pixels that a tile may touch in one block, to stay in the first-level cache
MAX_FLOATS = 2**31 - 1  # of all activations: the offsets in entries have 32 bits
MIN_TASK_MULTIPLIES = 500_000  # a task of fewer is not worth its counter
TASKS_A_THREAD = 2  # of one operation: with more, each reads the same pixels again
MIN_SHARED_TILE = 4  # vectors: shorter ones use each weight for too few pixels


@dataclass(frozen=True)
class Choice:
    """How one layer runs: rows and vectors of a tile, blocks of input channels."""

    group: int
    vectors: int
    blocks: int


@dataclass(eq=False)
class Layer:
    """A convolution or linear layer of a program."""

    step: Taps
    number: int  # of its record
    weights: Weights  # without its arrays once the program is sealed
    offsets: npt.NDArray[np.int64]
    choice: Choice
    shape: tuple[int, ...]  # of the weight
    density: float
    packed: Packed | None = None
    bias: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    def pack(self, group: int, blocks: int) -> Packed:
        """Pack the weights for ``group`` outputs at a time and ``blocks`` blocks of input channels."""
        return pack(self.weights, self.offsets, group, blocks, may_be_short=not self.step.is_vector)


class Program:
    """Records of all operations, and everything that they point to.

    Args:
        expanded: the steps.
        state: tensors of the ticket.
        masks: of its sparse weights.
        width: of vectors.
        threads: that one image is shared among.

    Raises:
        ConfigError: the image is so large that offsets of activations do not fit into 32 bits.
    """

    def __init__(
        self,
        expanded: Expanded,
        state: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        *,
        width: Width,
        threads: int,
    ) -> None:
        self.width, self.threads, self.expanded = width, threads, expanded
        self.operations = [step for step in expanded.steps if isinstance(step, Operation)]
        self.records = np.zeros((len(self.operations), RECORD_FIELDS), np.int64)
        self.layouts, self.arena_floats = self._lay_out()
        if self.arena_floats > MAX_FLOATS:
            side = f"{expanded.image.height}×{expanded.image.width}"
            raise ConfigError(
                f"an image of {side} pixels needs {4 * self.arena_floats / 1e9:,.1f} GB of activations, "
                f"expected at most {4 * MAX_FLOATS / 1e9:.1f}",
                do="use smaller images",
            )
        self.kernels: list[str] = []  # of each record
        self.layers: list[Layer] = []
        self._kept: list[Any] = []  # arrays that records point to
        self._masks: dict[tuple[int, int, int], Any] = {}
        self._state, self._sparse_masks = state, masks
        for number, step in enumerate(self.operations):
            self.kernels.append(self._fill(number, step))
        self._state, self._sparse_masks = {}, {}

    @property
    def needed(self) -> set[str]:
        """Names of the kernels, beside those of every program."""
        return {name for name in self.kernels if not name.startswith(("convolution", "linear"))}

    def link(self, library: Library) -> None:
        """Fill in the addresses of the code, and pack the weights of layers that have none."""
        self._kernel_set = library
        for number, name in enumerate(self.kernels):
            if name != "linear":
                self.records[number, CODE] = library.address(name)
        for layer in self.layers:
            self.choose(layer, layer.choice)

    def seal(self) -> None:
        """Forget the weights but for their packed form, which is put into one piece of memory."""
        for layer, packed in zip(self.layers, gathered([layer.packed for layer in self.layers]), strict=True):
            fields = LINEAR if layer.step.is_vector else CONVOLUTION
            self.records[layer.number, fields["entries"]] = packed.entries.ctypes.data
            layer.packed = packed
            layer.weights, layer.offsets = layer.weights.without_arrays(), layer.offsets[:0].copy()
            layer.step.layer.scale = layer.step.layer.bias = layer.bias[:0].copy()

    @property
    def num_bytes(self) -> int:
        """Memory of the packed weights and of everything else that records point to."""
        arrays = [*self._kept, *(mask for mask in self._masks.values() if mask is not None), self.records]
        packed = sum(layer.packed.num_bytes + layer.bias.nbytes for layer in self.layers if layer.packed is not None)
        return packed + sum(int(array.nbytes) for array in arrays)

    def choose(self, layer: Layer, choice: Choice, packed: Packed | None = None) -> None:
        """Let a layer run in another way."""
        if packed is None:
            old = layer.choice
            is_same = layer.packed is not None and (old.group, old.blocks) == (choice.group, choice.blocks)
            packed = layer.packed if is_same else None
        packed = packed or layer.pack(choice.group, choice.blocks)
        record, num_groups = self.records[layer.number], packed.counts.shape[1] - 1
        layer.choice, layer.packed = choice, packed
        fields = LINEAR if layer.step.is_vector else CONVOLUTION
        layer.bias = np.zeros(num_groups * choice.group + 8, np.float32)
        layer.bias[: layer.weights.num_outputs] = layer.step.layer.bias
        for name, array in (
            ("entries", packed.entries),
            ("counts", packed.counts),
            ("order", packed.order),
            ("bias", layer.bias),
            ("bases", packed.bases),
        ):
            if name in fields:
                record[fields[name]] = array.ctypes.data
        record[fields["groups"]] = num_groups
        if layer.step.is_vector:
            record[CODE] = self._kernel_set.address(f"linear_{choice.group}")
            chunks = self._chunks(layer.weights.values.size, num_groups)
            record[fields["chunks"]] = record[NUM_TASKS] = chunks
            return
        vectors = int(record[CONVOLUTION["vectors"]])
        tiles = -(-vectors // choice.vectors)
        size = -(-vectors // tiles)
        multiplies = layer.weights.values.size * vectors * self.width.lanes
        chunks = max(1, min(-(-TASKS_A_THREAD * self.threads // tiles), num_groups)) if self.threads > 1 else 1
        chunks = min(chunks, max(1, multiplies // MIN_TASK_MULTIPLIES))
        for name, number in (("blocks", choice.blocks), ("tiles", tiles), ("chunks", chunks), ("tile_vectors", size)):
            record[CONVOLUTION[name]] = number
        for name, length in (("wide", size), ("narrow", max(1, size - 1))):
            kernel = tile_name(choice.group, length, is_short=packed.is_short)
            record[CONVOLUTION[name]] = self._kernel_set.address(kernel)
        record[NUM_TASKS] = tiles * chunks

    def longest_tile(self, vectors: int) -> int:
        """Return how many of a plane's vectors a tile may have, so that every thread gets pixels of its own.

        Threads that compute other channels of the same pixels would read what the others have just written.
        """
        return vectors if self.threads == 1 else max(MIN_SHARED_TILE, -(-vectors // self.threads))

    def default_choice(self, weights: Weights, step: Taps) -> Choice:
        """Guess how a layer runs well."""
        if step.is_vector:
            fitting = [each for each in LINEAR_GROUPS if may_group(weights, each, is_rounded_up=True)]
            return Choice(max(fitting) if weights.density > 0.3 else 1, 1, 1)
        group = 4 if weights.density > 0.35 and may_group(weights, 4) else 1
        vectors = self.layouts[step.output].vectors
        size = min(tile_sizes(self.width)[group][-1], vectors)
        blocks = 1
        if weights.groups == 1:
            while blocks < 16 and weights.num_inputs * size * self.width.lanes > blocks * CACHE_FLOATS:
                blocks *= 2
        return Choice(group, size, blocks)

    # -- layout

    def _lay_out(self) -> tuple[dict[Planes, Layout], int]:
        steps = self.expanded.steps
        uses: dict[Planes, Use] = {}
        needs: dict[Planes, Needs] = {}
        rows = Rows()
        compact = self.expanded.compact

        def use(planes: Planes, moment: int) -> Needs:
            if planes is self.expanded.image:
                return Needs()
            uses.setdefault(planes, Use(moment, moment)).last = moment
            return needs.setdefault(planes, Needs())

        for moment, step in enumerate(steps):
            if isinstance(step, FromTorch):
                use(step.output, moment)
            elif isinstance(step, ToTorch):
                use(step.source, len(steps))  # torch may read it at any later time
            elif isinstance(step, Operation):
                for planes in (*step.inputs(), step.output):
                    use(planes, moment)
                if isinstance(step, Mean):
                    needs[step.source].is_clean = True
                if isinstance(step, Phases):
                    uses[step.output].key = ("phases", step.source.height, step.source.width, *step.remainders)
                if isinstance(step, Taps) and not step.is_vector and step.layer.other not in (None, step.source):
                    uses[step.output].replaces = step.layer.other
                joined = [planes for planes in (*step.inputs(), step.output) if planes not in compact]
                if isinstance(step, Taps | Add | Pointwise) and joined:
                    rows.join(*joined)
                if isinstance(step, Taps) and not step.is_vector:
                    _note_taps(step, needs[step.source])
        return place_all(uses, needs, rows, compact, self.width.lanes)

    # -- records

    def _fill(self, number: int, step: Operation) -> str:
        if isinstance(step, Taps):
            return self._layer(number, step)
        if isinstance(step, Output):
            return self._output(number, step)
        if isinstance(step, Phases):
            return self._copy(number, step.source, step.output, step.stride, step.remainders)
        if isinstance(step, Copy):
            return self._copy_whole(number, step)
        if isinstance(step, Pool):
            return self._pool(number, step)
        if isinstance(step, Mean):
            source = self.layouts[step.source]
            size = step.source.height * step.source.width
            numbers = {"share": _float(1 / size), "vectors": source.vectors, "channels": step.source.channels}
            self._set(number, MEAN, step, numbers | self._ends(step))
            return "mean"
        assert isinstance(step, Pointwise | Add), step
        return self._pointwise(number, step)

    def _ends(self, step: Operation) -> dict[str, int]:
        source, to = self.layouts[step.source], self.layouts[step.output]
        return {"source": source.place, "source_stride": source.stride, "to": to.place, "to_stride": to.stride}

    def _set(self, number: int, fields: Mapping[str, int], step: Operation, numbers: Mapping[str, int]) -> None:
        for name, value in numbers.items():
            self.records[number, fields[name]] = value
        size = step.output.channels * step.output.height * step.output.width
        chunks = self._chunks(10 * size, step.source.channels)
        if "chunks" in fields:
            self.records[number, fields["chunks"]] = chunks
        self.records[number, NUM_TASKS] = chunks

    def _chunks(self, multiplies: int, most: int) -> int:
        if self.threads == 1:
            return 1
        return max(1, min(most, 2 * self.threads, multiplies // MIN_TASK_MULTIPLIES))

    def _point(self, array: Any) -> int:
        array = np.ascontiguousarray(array)
        self._kept.append(array)
        return int(array.ctypes.data)

    def _mask(self, planes: Planes) -> int:
        layout = self.layouts[planes]
        if layout.is_compact or not layout.is_clean:
            return 0
        key = (planes.height, planes.width, layout.row)
        if key not in self._masks:
            self._masks[key] = mask_of(planes, layout, self.width.lanes)
        mask = self._masks[key]
        return 0 if mask is None else int(mask.ctypes.data)

    def _layer(self, number: int, step: Taps) -> str:
        layer, source, to = step.layer, self.layouts[step.source], self.layouts[step.output]
        numbered = {tap: index for index, tap in enumerate(step.taps)}
        mask = self._sparse_masks.get(layer.weight)
        weights = active_weights(
            _array(self._state[layer.weight]),
            None if mask is None else mask.numpy(),
            scale=layer.scale,
            groups=layer.groups,
            taps=numbered,
        )
        plane = np.arange(weights.num_inputs)[:, None] * step.num_phases
        spots = np.array([*step.taps.values()]).reshape(-1, 3)
        offsets = (plane + spots[:, 0]) * source.stride + spots[:, 1] * source.row + spots[:, 2]
        other = self.layouts[layer.other] if layer.other is not None else None
        numbers = {
            "source": source.place,
            "to": to.place,
            "other": -1 if other is None else other.place,
            "low": _float(layer.low),
            "high": _float(layer.high),
        }
        fields = LINEAR
        if not step.is_vector:
            fields = CONVOLUTION
            numbers |= {
                "to_stride": to.stride,
                "other_stride": 0 if other is None else other.stride,
                "vectors": to.vectors,
                "mask": self._mask(step.output),
            }
        for name, value in numbers.items():
            self.records[number, fields[name]] = value
        choice, shape = self.default_choice(weights, step), tuple(self._state[layer.weight].shape)
        self.layers.append(Layer(step, number, weights, offsets, choice, shape, weights.density))
        return "linear" if step.is_vector else "convolution"

    def _copy(
        self, number: int, source: Planes, to: Planes, stride: tuple[int, int], remainders: list[tuple[int, int]]
    ) -> str:
        numbers = {
            "phases": len(remainders),
            "table": self._point(np.array(remainders, np.int64)),
            "channels": source.channels,
            "height": source.height,
            "width": source.width,
            "row_step": stride[0],
            "column_step": stride[1],
        }
        numbers |= _renamed(self.layouts[source], "source") if source is not self.expanded.image else {"from_input": 1}
        if source is self.expanded.image:
            numbers |= {"source_stride": source.height * source.width, "source_row": source.width}
        numbers |= _renamed(self.layouts[to], "to")
        self._set(number, COPY, Operation("", source, to), numbers)
        return f"copy_{stride[1]}"

    def _copy_whole(self, number: int, step: Copy) -> str:
        name = self._copy(number, step.source, step.output, (1, 1), [(0, 0)])
        to = self.layouts[step.output]
        record = self.records[number]
        record[COPY["to"]] = to.place + step.first_channel * to.stride
        if step.is_flattened:
            record[COPY["to_stride"]] = step.source.height * step.source.width
            record[COPY["to_row"]] = step.source.width
        return name

    def _output(self, number: int, step: Output) -> str:
        planes, layout = step.source, self.layouts[step.source]
        name = self._copy(number, planes, planes, (1, 1), [(0, 0)])
        record = self.records[number]
        record[COPY["to_output"]] = 1
        record[COPY["to_stride"]], record[COPY["to_row"]] = planes.height * planes.width, planes.width
        if layout.is_compact:
            record[COPY["channels"]], record[COPY["width"]] = 1, planes.channels
        return name

    def _pool(self, number: int, step: Pool) -> str:
        source, to = self.layouts[step.source], self.layouts[step.output]
        numbers = self._ends(step) | {
            "source_row": source.row,
            "to_row": to.row,
            "channels": step.source.channels,
            "height": step.source.height,
            "width": step.source.width,
            "to_height": step.output.height,
            "to_width": step.output.width,
            "kernel_height": step.kernel[0],
            "row_step": step.stride[0],
            "top": step.padding[0],
            "left": step.padding[1],
            "shares": 0 if step.shares is None else self._point(step.shares),
        }
        self._set(number, POOL, step, numbers)
        return f"{step.kind}_{step.kernel[1]}x{step.stride[1]}"

    def _pointwise(self, number: int, step: Pointwise | Add) -> str:
        to = self.layouts[step.output]
        numbers = self._ends(step) | {
            "vectors": to.vectors,
            "channels": 1 if to.is_compact else step.output.channels,
            "mask": self._mask(step.output),
            "low": _float(step.low),
            "high": _float(step.high),
        }
        if isinstance(step, Add):
            assert step.other is not None
            other = self.layouts[step.other]
            self._set(number, ADD, step, numbers | {"other": other.place, "other_stride": other.stride})
            return "add"
        length = to.vectors * self.width.lanes if to.is_compact else step.output.channels
        for name, array in (("scale", step.scale), ("shift", step.shift)):
            numbers[name] = self._point(np.resize(array, max(length, array.size)))
        self._set(number, POINTWISE, step, numbers)
        return f"{step.function}_{'lanes' if to.is_compact else 'planes'}"


def _note_taps(step: Taps, needs: Needs) -> None:
    source, output = step.source, step.output
    for _, row, column in step.taps.values():
        left, right = max(0, -column), max(0, output.width - 1 + column - (source.width - 1))
        above, below = max(0, -row), max(0, output.height - 1 + row - (source.height - 1))
        needs.border = max(needs.border, left, right)
        needs.above, needs.below = max(needs.above, above), max(needs.below, below)
        needs.is_clean |= bool(left or right or above or below)
        needs.taps.append((row, column, output))


def _renamed(layout: Layout, name: str) -> dict[str, int]:
    return {name: layout.place, f"{name}_stride": layout.stride, f"{name}_row": layout.row}


def _array(tensor: Tensor) -> npt.NDArray[np.float32]:
    return np.asarray(tensor.detach().float().numpy())


def _float(value: float) -> int:
    """Return the bits of a float32 in the first half of a 64-bit field."""
    return int(struct.unpack("<q", struct.pack("<fI", value, 0))[0])
