"""Everything beside convolutions and linear layers as LLVM IR: copies, pooling, sums, activations.

The innermost loops are plain; LLVM makes vectors of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from llvmlite import ir

from pipeline.inference.emit import F32, I32, I64, Emitter, Width, i64
from pipeline.inference.kernels import TASK, share
from pipeline.inference.records import ADD, COPY, MEAN, POINTWISE, POOL


def copy(module: Any, width: Width, column_step: int) -> None:
    """Add ``copy_S``: planes with other strides, or the phase planes of a convolution with stride S."""
    e = Emitter(module, f"copy_{column_step}", TASK, width)
    record, arena, given, output, task = e.function.args
    b = e.builder
    of = {name: e.field(record, COPY[name]) for name in COPY if name not in ("table", "column_step")}
    table = e.pointer_field(record, COPY["table"])
    source_base = b.select(e.is_set(of["from_input"]), given, e.address(arena, of["source"]))
    to_base = b.select(e.is_set(of["to_output"]), output, e.address(arena, of["to"]))
    first, end = share(e, of["channels"], task, of["chunks"])
    with e.loop(first, end) as channel, e.loop(i64(0), of["phases"]) as phase:
        row0, column0 = (e.load(e.address(table, b.add(b.mul(phase.index, i64(2)), i64(k)), 8), I64, 8) for k in (0, 1))
        source = e.address(source_base, b.mul(channel.index, of["source_stride"]))
        source = e.address(source, b.add(b.mul(row0, of["source_row"]), column0))
        plane = b.add(b.mul(channel.index, of["phases"]), phase.index)
        to = e.address(to_base, b.mul(plane, of["to_stride"]))
        num_rows = _steps(e, b.sub(of["height"], row0), of["row_step"])
        num_columns = _steps(e, b.sub(of["width"], column0), i64(column_step))
        from_row = b.mul(of["row_step"], of["source_row"])
        with e.loop(i64(0), num_rows) as row:
            line = e.address(source, b.mul(row.index, from_row))
            to_line = e.address(to, b.mul(row.index, of["to_row"]))
            with e.loop(i64(0), num_columns) as column:
                value = e.load(e.address(line, b.mul(column.index, i64(column_step))), F32)
                b.store(value, e.address(to_line, column.index), align=4)
    e.finish()


def _steps(e: Emitter, length: Any, step: Any) -> Any:
    """Return how many steps fit into a length, the first at its start."""
    b = e.builder
    return b.sdiv(b.add(length, b.sub(step, i64(1))), step)


def pool(module: Any, width: Width, kind: str, kernel_width: int, column_step: int) -> None:
    """Add ``max_KxS`` or ``average_KxS``: pooling with kernels K wide and S columns apart.

    Each row of the output first pools rows, then columns. ``shares`` is one over the number of pixels
    that an average counts, for each output pixel.
    """
    e = Emitter(module, f"{kind}_{kernel_width}x{column_step}", TASK, width)
    record, arena, _, _, task = e.function.args
    b = e.builder
    of = {name: e.field(record, POOL[name]) for name in POOL if name != "shares"}
    neutral = ir.Constant(F32, -math.inf if kind == "max" else 0.0)
    shares = e.pointer_field(record, POOL["shares"])
    # a row with borders: all that the last kernel reaches, on either side of the pixels
    length = b.add(b.mul(b.sub(of["to_width"], i64(1)), i64(column_step)), i64(kernel_width))
    length = e.maximum(length, b.add(of["left"], of["width"]))
    pooled_row = b.alloca(F32, length)
    pixels = e.address(pooled_row, of["left"])

    def combine(total: Any, value: Any) -> Any:
        if kind != "max":
            return b.fadd(total, value)
        is_taken = b.or_(b.fcmp_ordered(">", value, total), b.fcmp_unordered("uno", value, value))
        return b.select(is_taken, value, total)

    first, end = share(e, of["channels"], task, of["chunks"])
    with e.loop(first, end) as channel, e.loop(i64(0), of["to_height"]) as row:
        source = e.address(e.address(arena, of["source"]), b.mul(channel.index, of["source_stride"]))
        to = e.address(e.address(arena, of["to"]), b.mul(channel.index, of["to_stride"]))
        to = e.address(to, b.mul(row.index, of["to_row"]))
        with e.loop(i64(0), length) as column:
            b.store(neutral, e.address(pooled_row, column.index), align=4)
        top = b.sub(b.mul(row.index, of["row_step"]), of["top"])
        bottom = e.minimum(b.add(top, of["kernel_height"]), of["height"])
        with e.loop(e.maximum(top, i64(0)), bottom) as inner:
            line = e.address(source, b.mul(inner.index, of["source_row"]))
            with e.loop(i64(0), of["width"]) as column:
                place = e.address(pixels, column.index)
                value = combine(e.load(place, F32), e.load(e.address(line, column.index), F32))
                b.store(value, place, align=4)
        with e.loop(i64(0), of["to_width"]) as column:
            place = e.address(pooled_row, b.mul(column.index, i64(column_step)))
            value = neutral
            for number in range(kernel_width):
                value = combine(value, e.load(e.address(place, i64(number)), F32))
            if kind != "max":
                number = b.add(b.mul(row.index, of["to_width"]), column.index)
                value = b.fmul(value, e.load(e.address(shares, number), F32))
            b.store(value, e.address(to, column.index), align=4)
    e.finish()


def mean(module: Any, width: Width) -> None:
    """Add ``mean`` over all pixels of each plane; what lies between rows must be 0."""
    e = Emitter(module, "mean", TASK, width)
    record, arena, _, _, task = e.function.args
    b = e.builder
    of = {name: e.field(record, MEAN[name]) for name in MEAN if name != "share"}
    first, end = share(e, of["channels"], task, of["chunks"])
    factor = e.float_field(record, MEAN["share"])
    with e.loop(first, end) as channel:
        source = e.address(e.address(arena, of["source"]), b.mul(channel.index, of["source_stride"]))
        with e.loop(i64(0), of["vectors"], [e.constant(0.0)]) as part:
            part.next = [b.fadd(part.values[0], e.vector_at(source, b.mul(part.index, i64(width.lanes))))]
        total = ir.Constant(F32, 0.0)
        for lane in range(width.lanes):
            total = b.fadd(total, b.extract_element(part.values[0], ir.Constant(I32, lane)))
        to = e.address(e.address(arena, of["to"]), b.mul(channel.index, of["to_stride"]))
        b.store(b.fmul(total, factor), to, align=4)
    e.finish()


def add(module: Any, width: Width) -> None:
    """Add ``add``: the sum of two sets of planes, clamped."""
    e = Emitter(module, "add", TASK, width)
    low, high = (e.spread(e.float_field(e.function.args[0], ADD[name])) for name in ("low", "high"))

    def total(channel: Any, start: Any, vector: Callable[[str], Any]) -> Any:
        return e.clamp(e.builder.fadd(vector("source"), vector("other")), low, high)

    _each_vector(e, ADD, total)


def pointwise(module: Any, width: Width, function: str, *, is_by_lane: bool) -> None:
    """Add ``FUNCTION_planes`` or ``FUNCTION_lanes``: scale, shift and clamp, then a function of :data:`FUNCTIONS`.

    Scale and shift are one number for each plane, or for each lane of a single row.
    """
    e = Emitter(module, f"{function}_{'lanes' if is_by_lane else 'planes'}", TASK, width)
    record = e.function.args[0]
    low, high = (e.spread(e.float_field(record, POINTWISE[name])) for name in ("low", "high"))
    scale, shift = (e.pointer_field(record, POINTWISE[name]) for name in ("scale", "shift"))

    def changed(channel: Any, start: Any, vector: Callable[[str], Any]) -> Any:
        a, b = (
            e.vector_at(base, start) if is_by_lane else e.spread(e.load(e.address(base, channel), F32))
            for base in (scale, shift)
        )
        return FUNCTIONS[function](e, e.clamp(e.multiply_add(vector("source"), a, b), low, high))

    _each_vector(e, POINTWISE, changed)


def _each_vector(
    e: Emitter, numbers: Mapping[str, int], value_of: Callable[[Any, Any, Callable[[str], Any]], Any]
) -> None:
    """Write ``value_of(channel, first lane, function that loads a source's vector)`` to each vector of each plane."""
    record, arena, _, _, task = e.function.args
    b = e.builder
    names = [name for name in ("source", "other", "to") if name in numbers]
    bases = {name: e.address(arena, e.field(record, numbers[name])) for name in names}
    strides = {name: e.field(record, numbers[f"{name}_stride"]) for name in names}
    mask = e.pointer_field(record, numbers["mask"])
    vectors = e.field(record, numbers["vectors"])
    first, end = share(e, e.field(record, numbers["channels"]), task, e.field(record, numbers["chunks"]))
    with e.loop(first, end) as channel:
        planes = {name: e.address(bases[name], b.mul(channel.index, strides[name])) for name in names}
        with e.loop(i64(0), vectors) as part:
            start = b.mul(part.index, i64(e.width.lanes))
            value = value_of(channel.index, start, lambda name: e.vector_at(planes[name], start))
            (value,) = e.either(
                e.is_set(mask),
                lambda: [e.keep_where(value, e.load(e.address(mask, start), e.width.bits))],
                lambda: [value],
            )
            e.store_vector(value, planes["to"], start)
    e.finish()


# -- functions of one vector; constants of exp are those of Cephes, of erfc those of Numerical Recipes (6.2, erfcc)

ERFC = (-0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223)


def _exp(e: Emitter, x: Any) -> Any:
    """Return e to the power of x, to about 1e-7 of the value; NaN stays NaN."""
    b, c = e.builder, e.constant
    x = e.clamp(x, c(-87.0), c(88.0))
    whole = b.call(e.intrinsic("llvm.rint"), [b.fmul(x, c(1.44269504088896341))])
    rest = e.multiply_add(whole, c(-0.693359375), x)
    rest = e.multiply_add(whole, c(2.12194440e-4), rest)
    value = c(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        value = e.multiply_add(value, rest, c(factor))
    value = b.fadd(e.multiply_add(value, b.fmul(rest, rest), rest), c(1.0))
    # a NaN has no whole part: 0 then, and the product stays NaN
    exponent = b.fptosi(b.select(b.fcmp_ordered("ord", whole, whole), whole, c(0.0)), e.width.bits)
    bits = b.shl(
        b.add(exponent, ir.Constant(e.width.bits, [127] * e.width.lanes)),
        ir.Constant(e.width.bits, [23] * e.width.lanes),
    )
    return b.fmul(value, b.bitcast(bits, e.width.vector))


def _sigmoid(e: Emitter, x: Any) -> Any:
    b, c = e.builder, e.constant
    return b.fdiv(c(1.0), b.fadd(c(1.0), _exp(e, b.fneg(x))))


def _tanh(e: Emitter, x: Any) -> Any:
    b, c = e.builder, e.constant
    return e.multiply_add(c(2.0), _sigmoid(e, b.fadd(x, x)), c(-1.0))


def _erfc(e: Emitter, x: Any) -> Any:
    """Return 1 − erf(x) for x ≥ 0, to about 1e-6 of the value, however small it is."""
    b, c = e.builder, e.constant
    t = b.fdiv(c(1.0), e.multiply_add(c(0.5), x, c(1.0)))
    power = c(0.17087277)
    for factor in ERFC:
        power = e.multiply_add(power, t, c(factor))
    return b.fmul(t, _exp(e, b.fsub(power, b.fmul(x, x))))


def _gelu(e: Emitter, x: Any) -> Any:
    b, c = e.builder, e.constant
    tail = _erfc(e, b.fmul(b.call(e.intrinsic("llvm.fabs"), [x]), c(math.sqrt(0.5))))
    # 1 + erf would lose the digits of a small result
    return b.fmul(b.fmul(x, c(0.5)), b.select(b.fcmp_ordered("<", x, c(0.0)), tail, b.fsub(c(2.0), tail)))


def _gelu_tanh(e: Emitter, x: Any) -> Any:
    b, c = e.builder, e.constant
    inner = b.fmul(x, e.multiply_add(b.fmul(x, x), c(0.044715), c(1.0)))
    return b.fmul(b.fmul(x, c(0.5)), b.fadd(c(1.0), _tanh(e, b.fmul(inner, c(math.sqrt(2 / math.pi))))))


def _silu(e: Emitter, x: Any) -> Any:
    return e.builder.fmul(x, _sigmoid(e, x))


def _hardsigmoid(e: Emitter, x: Any) -> Any:
    shifted = e.clamp(e.builder.fadd(x, e.constant(3.0)), e.constant(0.0), e.constant(6.0))
    return e.builder.fmul(shifted, e.constant(1 / 6))


def _hardswish(e: Emitter, x: Any) -> Any:
    return e.builder.fmul(x, _hardsigmoid(e, x))


FUNCTIONS: dict[str, Callable[[Emitter, Any], Any]] = {
    "same": lambda e, x: x,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "hardsigmoid": _hardsigmoid,
    "hardswish": _hardswish,
}
