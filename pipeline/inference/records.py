"""Records of operations: the rows of numbers with which compiled code and Python talk to each other.

A program is an array of records of :data:`RECORD_FIELDS` 64-bit fields. The first two fields are the
address of the operation's code and its number of tasks; the others are listed below, by kind of
operation. Places and strides count floats, and places start at the first float of the arena.
"""

from __future__ import annotations

RECORD_FIELDS = 32
CODE, NUM_TASKS = 0, 1


def _numbers(names: str) -> dict[str, int]:
    return {name: number for number, name in enumerate(names.split(), 2)}


# source: the planes read. to: the planes written. other: added before the clamp; -1: nothing.
# bases: added to the offsets of a block of entries. vectors: of one output plane. tiles × chunks =
# tasks: parts of the vectors times parts of the rows.
CONVOLUTION = _numbers(
    "source to other to_stride other_stride vectors groups blocks tiles chunks entries bases counts order bias mask "
    "low high tile_vectors wide narrow"
)
LINEAR = _numbers("source to other groups chunks entries counts order bias low high")
# rows and columns of the source whose numbers are (row, column) modulo the strides become one phase plane
COPY = _numbers(
    "from_input source source_stride source_row to_output to to_stride to_row phases table channels height width "
    "row_step column_step chunks"
)
POOL = _numbers(
    "source source_stride source_row to to_stride to_row channels height width to_height to_width kernel_height "
    "row_step top left shares chunks"
)
MEAN = _numbers("source source_stride vectors to to_stride channels share chunks")
ADD = _numbers("source source_stride other other_stride to to_stride vectors channels mask low high chunks")
POINTWISE = _numbers("source source_stride to to_stride vectors channels scale shift mask low high chunks")
