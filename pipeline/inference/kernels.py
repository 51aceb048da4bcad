"""The convolution and linear kernels as LLVM IR.

A convolution keeps its sums in registers: a tile of R vectors of neighbouring pixels for each of G
output channels. The active weights of a group of G channels are entries ``{offset, G weights}``;
an entry's offset, added to the place of the tile, is where its input pixels start. Offsets have 32
bits, or 16 where that is enough for a single row (:mod:`pipeline.inference.pack`). Padding costs
nothing: rows end in zeros which the next row shares as its left border, and planes are apart.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from pipeline.inference.emit import F32, I16, I32, I64, POINTER, Emitter, Width, i64
from pipeline.inference.records import CONVOLUTION, LINEAR

TASK = (POINTER, POINTER, POINTER, POINTER, I64)  # record, arena, input, output, number of the task
TILE = (POINTER, POINTER, I64, I64, I64, I64)  # record, arena, first vector, first and last group, block
# A fused multiply-add takes 4 cycles and two start in each: fewer sums than this would wait for one another.
MIN_SUMS = 8


def tile_name(group: int, num_vectors: int, *, is_short: bool = False) -> str:
    """Name the kernel of a tile of ``num_vectors`` vectors and ``group`` rows, whose offsets may be short."""
    return f"tile_{group}x{num_vectors}" + ("_short" if is_short else "")


def tile_sizes(width: Width) -> dict[int, list[int]]:
    """For each number of rows, how many vectors a tile may have: so many that all sums stay in registers."""
    free = width.registers - (4 if width.registers <= 16 else 6)  # the rest is for weights and pixels
    most = {1: min(free + 1, 17), 2: free // 2, 4: free // 4}
    return {group: list(range(1, largest + 1)) for group, largest in most.items()}


def convolution(module: Any, width: Width) -> None:
    """Add the kernel ``convolution``, which runs one task, and all its tiles."""
    for group, sizes in tile_sizes(width).items():
        for size in sizes:
            for is_short in (False, True) if group == 1 else (False,):
                _tile(module, width, group, size, is_short=is_short)
    e = Emitter(module, "convolution", TASK, width)
    record, arena, _, _, task = e.function.args
    b = e.builder
    vectors, groups, blocks, tiles, chunks, size = (
        e.field(record, CONVOLUTION[name])
        for name in ("vectors", "groups", "blocks", "tiles", "chunks", "tile_vectors")
    )
    first, end = share(e, vectors, b.sdiv(task, chunks), tiles)
    first_group, last_group = share(e, groups, b.srem(task, chunks), chunks)
    is_wide = b.icmp_signed("==", b.sub(end, first), size)
    code = b.select(is_wide, e.field(record, CONVOLUTION["wide"]), e.field(record, CONVOLUTION["narrow"]))
    with e.loop(i64(0), blocks) as turn:
        e.call(code, TILE, [record, arena, first, first_group, last_group, turn.index])
    e.finish()


def share(e: Emitter, whole: Any, number: Any, parts: Any) -> tuple[Any, Any]:
    """Return where part ``number`` of ``parts`` equal parts starts and ends."""
    b = e.builder
    return b.sdiv(b.mul(whole, number), parts), b.sdiv(b.mul(whole, b.add(number, i64(1))), parts)


def _tile(module: Any, width: Width, group: int, size: int, *, is_short: bool) -> None:
    """Add a tile: for each group of channels, one block's entries times ``size`` vectors."""
    e = Emitter(module, tile_name(group, size, is_short=is_short), TILE, width)
    record, arena, first, first_group, last_group, block = e.function.args
    b = e.builder

    def field(name: str) -> Any:
        return e.field(record, CONVOLUTION[name])

    start = b.mul(first, i64(width.lanes))
    base = b.sext(e.load(e.address(e.pointer_field(record, CONVOLUTION["bases"]), block), I32), I64)
    source = e.address(arena, b.add(b.add(field("source"), start), base))
    to, other = (e.address(arena, b.add(field(name), start)) for name in ("to", "other"))
    has_other = b.icmp_signed(">=", field("other"), i64(0))
    to_stride, other_stride = field("to_stride"), field("other_stride")
    entries, bias, mask = (e.pointer_field(record, CONVOLUTION[name]) for name in ("entries", "bias", "mask"))
    counts = e.address(e.pointer_field(record, CONVOLUTION["counts"]), b.mul(block, b.add(field("groups"), i64(1))))
    order = e.address(e.pointer_field(record, CONVOLUTION["order"]), b.mul(block, field("groups")))
    low, high = (e.spread(e.float_field(record, CONVOLUTION[name])) for name in ("low", "high"))
    is_first = b.icmp_signed("==", block, i64(0))
    is_last = b.icmp_signed("==", b.add(block, i64(1)), field("blocks"))
    num_sets = 2 if group * size < MIN_SUMS else 1  # of sums, of which each takes every second entry

    def rows(channel: Any, base: Any, stride: Any) -> list[Any]:
        return [e.address(base, b.mul(b.add(channel, i64(row)), stride)) for row in range(group)]

    def vectors(bases: list[Any]) -> list[Any]:
        return [e.vector_at(base, i64(width.lanes * number)) for base in bases for number in range(size)]

    def accumulate(number: Any, sums: list[Any]) -> list[Any]:
        if is_short:
            entry = e.address(entries, b.mul(number, i64(3)), 2)
            offset = b.zext(e.load(entry, I16, 2), I64)
            weights = [e.load(e.address(entry, i64(1), 2), F32, 2)]
        else:
            entry = e.address(entries, b.mul(number, i64(group + 1)))
            offset = b.sext(e.load(entry, I32), I64)
            weights = [e.load(e.address(entry, i64(1 + row)), F32) for row in range(group)]
        place = e.address(source, offset)
        pixels = [e.vector_at(place, i64(width.lanes * number)) for number in range(size)]
        spread = [e.spread(weight) for weight in weights]
        # the fewer of both stay in registers while the others pass
        order = [(row, number) for row in range(group) for number in range(size)]
        if size >= group:
            order.sort(key=lambda pair: pair[1])
        products = {
            (row, number): e.multiply_add(spread[row], pixels[number], sums[row * size + number])
            for row, number in order
        }
        return [products[row, number] for row in range(group) for number in range(size)]

    with e.loop(first_group, last_group) as turn:
        channel = b.sext(e.load(e.address(order, turn.index), I32), I64)
        written = rows(channel, to, to_stride)

        def biases() -> list[Any]:
            values = [e.spread(e.load(e.address(bias, b.add(channel, i64(row))), F32)) for row in range(group)]
            return [value for value in values for _ in range(size)]

        def first_sums() -> list[Any]:
            values = biases()

            def with_others() -> list[Any]:
                others = vectors(rows(channel, other, other_stride))
                return [b.fadd(value, more) for value, more in zip(values, others, strict=True)]

            return e.either(has_other, with_others, lambda: values)

        # what is added comes first: the output may then take its place in memory
        sums = e.either(is_first, first_sums, lambda: vectors(written))
        begin, end = (b.sext(e.load(e.address(counts, b.add(turn.index, i64(more))), I32), I64) for more in (0, 1))
        if num_sets == 2:
            num_sums, even = len(sums), b.sub(end, b.and_(b.sub(end, begin), i64(1)))
            zeros = [e.constant(0.0)] * num_sums
            with e.loop(begin, even, [*sums, *zeros], step=2) as pair:
                pair.next = accumulate(pair.index, pair.values[:num_sums])
                pair.next += accumulate(b.add(pair.index, i64(1)), pair.values[num_sums:])
            sums = [b.fadd(*both) for both in zip(pair.values[:num_sums], pair.values[num_sums:], strict=True)]
            begin = even
        with e.loop(begin, end, sums) as one:
            one.next = accumulate(one.index, one.values)
        sums = one.values

        def completed() -> list[Any]:
            def masked() -> list[Any]:
                masks = [
                    e.load(e.address(mask, b.add(start, i64(width.lanes * number))), width.bits)
                    for number in range(size)
                ]
                return [e.keep_where(value, masks[index % size]) for index, value in enumerate(values)]

            values = [e.clamp(value, low, high) for value in sums]
            return e.either(e.is_set(mask), masked, lambda: values)

        values = e.either(is_last, completed, lambda: sums)
        for index, value in enumerate(values):
            e.store_vector(value, written[index // size], i64(width.lanes * (index % size)))
    e.finish()


def linear(module: Any, width: Width, group: int) -> None:
    """Add ``linear_G``: a layer whose inputs are numbers instead of planes, G outputs at a time.

    An entry is ``{place of the input, G weights}``.
    """
    e = Emitter(module, f"linear_{group}", TASK, width)
    record, arena, _, _, task = e.function.args
    b = e.builder
    kind = ir.VectorType(F32, group) if group > 1 else F32
    wide = Width(group, width.registers)

    def field(name: str) -> Any:
        return e.field(record, LINEAR[name])

    def spread(value: Any) -> Any:
        if group == 1:
            return value
        e.width, kept = wide, e.width
        value = e.spread(value)
        e.width = kept
        return value

    source = e.address(arena, field("source"))
    to, other = (e.address(arena, field(name)) for name in ("to", "other"))
    has_other = b.icmp_signed(">=", field("other"), i64(0))
    entries, counts, bias = (e.pointer_field(record, LINEAR[name]) for name in ("entries", "counts", "bias"))
    low, high = (spread(e.float_field(record, LINEAR[name])) for name in ("low", "high"))
    zero = ir.Constant(kind, [0.0] * group) if group > 1 else ir.Constant(kind, 0.0)
    begin_group, end_group = share(e, field("groups"), task, field("chunks"))

    def accumulate(number: Any, total: Any) -> Any:
        entry = e.address(entries, b.mul(number, i64(group + 1)))
        value = e.load(e.address(source, b.sext(e.load(entry, I32), I64)), F32)
        return e.multiply_add(e.load(e.address(entry, i64(1)), kind), spread(value), total)

    order = e.pointer_field(record, LINEAR["order"])
    with e.loop(begin_group, end_group) as turn:
        channel = b.sext(e.load(e.address(order, turn.index), I32), I64)
        begin, end = (b.sext(e.load(e.address(counts, b.add(turn.index, i64(more))), I32), I64) for more in (0, 1))
        whole = b.sub(end, b.and_(b.sub(end, begin), i64(3)))
        first = e.load(e.address(bias, channel), kind)
        with e.loop(begin, whole, [first, zero, zero, zero], step=4) as four:
            four.next = [accumulate(b.add(four.index, i64(k)), value) for k, value in enumerate(four.values)]
        total = b.fadd(b.fadd(*four.values[:2]), b.fadd(*four.values[2:]))
        with e.loop(whole, end, [total]) as one:
            one.next = [accumulate(one.index, one.values[0])]
        (total,) = one.values
        (total,) = e.either(
            has_other,
            lambda: [b.fadd(total, e.load(e.address(other, channel), kind))],
            lambda: [total],
        )
        b.store(e.clamp(total, low, high), e.address(to, channel), align=4)
    e.finish()
