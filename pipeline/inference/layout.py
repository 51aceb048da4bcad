"""Where planes lie in memory: rows that share their zero border, planes apart, and memory used again.

A row of an H × W plane takes W floats and a border of zeros, which is the right border of the row
and the left one of the next. All planes between which a tap of a kernel is one fixed offset have the
same length of rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.inference.graph import Planes

LINE = 16  # floats in a cache line; planes start at odd multiples of it from one another, in all cache sets


@dataclass
class Needs:
    """What the readers of planes need around them."""

    border: int = 0  # zeros at the end of a row
    above: int = 0  # rows of zeros
    below: int = 0
    taps: list[tuple[int, int, Planes]] = field(default_factory=list)  # rows, columns, and the planes computed
    is_clean: bool = False  # everything that is not a pixel is 0


@dataclass(frozen=True)
class Layout:
    """Where planes lie. Places and strides count floats."""

    place: int  # of the first pixel of the first plane
    row: int  # from one row to the next
    stride: int  # from one plane to the next
    vectors: int  # that hold all pixels of a plane
    is_clean: bool

    @property
    def is_compact(self) -> bool:
        """Whether each plane is one number, stored one after the other."""
        return self.stride == 1


class Rows:
    """Which planes have rows of the same length (union-find)."""

    def __init__(self) -> None:
        self.parent: dict[Planes, Planes] = {}

    def root(self, planes: Planes) -> Planes:
        """Return the planes that stand for all of the same row length."""
        while (above := self.parent.setdefault(planes, planes)) is not planes:
            planes = above
        return planes

    def join(self, *group: Planes) -> None:
        """Give planes the same row length."""
        first = self.root(group[0])
        for each in group[1:]:
            self.parent[self.root(each)] = first


def round_up(number: int, step: int) -> int:
    """Return the smallest multiple of ``step`` that is not below ``number``."""
    return -(-number // step) * step


@dataclass
class Use:
    """From which step to which planes are needed."""

    first: int
    last: int
    key: tuple[object, ...] = ()  # planes of other keys never share their memory
    replaces: Planes | None = None  # planes that the same step reads, each number before it is written


def place_all(
    uses: dict[Planes, Use], needs: dict[Planes, Needs], rows: Rows, compact: Iterable[Planes], lanes: int
) -> tuple[dict[Planes, Layout], int]:
    """Lay out all planes.

    Args:
        uses: of all planes.
        needs: of all planes.
        rows: which have rows of the same length.
        compact: vectors whose numbers lie one after the other.
        lanes: floats in a vector.

    Returns:
        The layouts, and the size of the arena in floats.
    """
    row_of: dict[Planes, int] = {}
    compact = set(compact)
    for planes in uses:
        if planes not in compact:
            root = rows.root(planes)
            row_of[root] = max(row_of.get(root, 0), planes.width + needs[planes].border)
    slots: list[_Slot] = []
    chosen: dict[Planes, _Slot] = {}
    classes: dict[tuple[int, int, int], _Class] = {}
    for planes in uses:
        if planes not in compact:
            row = row_of[rows.root(planes)]
            classes.setdefault((planes.height, planes.width, row), _Class()).include(planes, needs[planes], row, lanes)
    for planes, use in sorted(uses.items(), key=lambda item: item[1].first):
        if planes in compact:
            key: tuple[object, ...] = ("vector",)
        else:
            row = row_of[rows.root(planes)]
            key = (planes.height, planes.width, row, needs[planes].is_clean, *use.key)
        free = [slot for slot in slots if slot.key == key and slot.last < use.first]
        old = chosen.get(use.replaces) if use.replaces is not None else None
        if old is not None and old.key == key and old.last == use.first:
            free = [old]
        # the smallest that is large enough, or else the largest
        free.sort(key=lambda slot: (slot.channels < planes.channels, abs(slot.channels - planes.channels)))
        if free:
            slot = free[0]
        else:
            slots.append(slot := _Slot(key))
        slot.last, slot.channels = use.last, max(slot.channels, planes.channels)
        chosen[planes] = slot
    size = LINE
    layouts: dict[Planes, Layout] = {}
    for slot in slots:
        members = [planes for planes, each in chosen.items() if each is slot]
        if members[0] in compact:
            slot.place, size = size, size + round_up(slot.channels, LINE) + LINE
            continue
        kind = classes[_class_of(members[0], row_of, rows)]
        slot.place = round_up(size + kind.before, LINE)
        size = round_up(slot.place + (slot.channels - 1) * kind.stride + kind.after, LINE) + LINE
    for planes, slot in chosen.items():
        if planes in compact:
            layouts[planes] = Layout(slot.place, 1, 1, -(-planes.channels // lanes), True)
            continue
        row = row_of[rows.root(planes)]
        kind = classes[_class_of(planes, row_of, rows)]
        layouts[planes] = Layout(slot.place, row, kind.stride, num_vectors(planes, row, lanes), needs[planes].is_clean)
    return layouts, size


def num_vectors(planes: Planes, row: int, lanes: int) -> int:
    """Return how many vectors hold all pixels of a plane."""
    return -(-((planes.height - 1) * row + planes.width) // lanes)


def mask_of(planes: Planes, layout: Layout, lanes: int) -> npt.NDArray[np.int32] | None:
    """Return all bits set for lanes that hold pixels, and 0 for others; None if all do."""
    mask = np.zeros(layout.vectors * lanes, np.int32)
    for row in range(planes.height):
        mask[row * layout.row : row * layout.row + planes.width] = -1
    return None if mask.all() else mask


def _class_of(planes: Planes, row_of: dict[Planes, int], rows: Rows) -> tuple[int, int, int]:
    return planes.height, planes.width, row_of[rows.root(planes)]


@dataclass
class _Slot:
    key: tuple[object, ...]
    channels: int = 0
    last: int = -1
    place: int = 0


@dataclass
class _Class:
    """What all planes of one height, width and row length need: they have the same stride."""

    before: int = 0  # floats before the first plane that readers may touch
    after: int = 0  # floats from the start of the last plane
    stride: int = 0

    def include(self, planes: Planes, needs: Needs, row: int, lanes: int) -> None:
        pixels = (planes.height - 1) * row + planes.width
        stored = round_up(pixels, lanes)
        gap = max(needs.above, needs.below) * row + needs.border
        stride = round_up(max(self.stride, stored, pixels + gap), LINE)
        self.stride = stride if stride // LINE % 2 else stride + LINE
        self.before = max(self.before, needs.above * row + needs.border)
        self.after = max(self.after, stored, pixels + gap)
        for rows, columns, output in needs.taps:
            tap = rows * row + columns
            self.before = max(self.before, -tap)
            self.after = max(self.after, tap + num_vectors(output, row, lanes) * lanes)
