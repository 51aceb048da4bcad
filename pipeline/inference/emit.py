"""Helpers that print LLVM IR: loops, branches and vectors of 32-bit floats."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

I1, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
F32, POINTER = ir.FloatType(), ir.PointerType()
VOID = ir.VoidType()


def i64(value: int) -> Any:
    """Return a 64-bit constant."""
    return ir.Constant(I64, value)


@dataclass(frozen=True)
class Width:
    """How many floats a vector has, and how many vectors the processor's registers hold."""

    lanes: int
    registers: int

    @property
    def vector(self) -> Any:
        """The LLVM type of one vector."""
        return ir.VectorType(F32, self.lanes)

    @property
    def bits(self) -> Any:
        """The LLVM type of a vector's bits."""
        return ir.VectorType(I32, self.lanes)


class Emitter:
    """One function of a module under construction.

    Args:
        module: the module that the function is added to.
        name: of the function.
        parameters: LLVM types.
        width: of its vectors.
        is_exported: whether Python looks its address up; others may be inlined and dropped.
    """

    def __init__(
        self, module: Any, name: str, parameters: Sequence[Any], width: Width, *, is_exported: bool = True
    ) -> None:
        self.module, self.width = module, width
        self.function = ir.Function(module, ir.FunctionType(VOID, parameters), name)
        if not is_exported:
            self.function.linkage = "internal"
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))

    # -- memory

    def address(self, base: Any, index: Any, size: int = 4) -> Any:
        """Return the address of element ``index`` of ``size`` bytes."""
        element = {2: I16, 4: F32, 8: I64}[size]
        return self.builder.gep(base, [index], source_etype=element)

    def load(self, address: Any, kind: Any, align: int = 4) -> Any:
        """Load a value of the LLVM type ``kind``."""
        return self.builder.load(address, align=align, typ=kind)

    def field(self, record: Any, number: int) -> Any:
        """Load a 64-bit field of an operation's record."""
        return self.load(self.address(record, i64(number), 8), I64, 8)

    def pointer_field(self, record: Any, number: int) -> Any:
        """Load a field that holds an address."""
        return self.builder.inttoptr(self.field(record, number), POINTER)

    def float_field(self, record: Any, number: int) -> Any:
        """Load a field whose first four bytes are a float."""
        return self.load(self.address(record, i64(number), 8), F32, 8)

    def vector_at(self, base: Any, index: Any) -> Any:
        """Load a vector that starts at float ``index`` of ``base``."""
        return self.load(self.address(base, index), self.width.vector)

    def store_vector(self, value: Any, base: Any, index: Any) -> None:
        """Store a vector at float ``index`` of ``base``."""
        self.builder.store(value, self.address(base, index), align=4)

    # -- vectors

    def spread(self, scalar: Any) -> Any:
        """Return a vector with ``scalar`` in all lanes."""
        kind = ir.VectorType(scalar.type, self.width.lanes)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        zeros = ir.Constant(self.width.bits, [0] * self.width.lanes)
        return self.builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)

    def constant(self, value: float) -> Any:
        """Return a vector with the same number in all lanes."""
        return ir.Constant(self.width.vector, [float(value)] * self.width.lanes)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """Return ``a * b + c``, rounded once where the processor can."""
        return self.builder.fadd(self.builder.fmul(a, b, flags=["contract"]), c, flags=["contract"])

    def clamp(self, value: Any, low: Any, high: Any) -> Any:
        """Limit each lane; NaN stays NaN, as in torch."""
        b = self.builder
        value = b.select(b.fcmp_ordered("<", value, low), low, value)
        return b.select(b.fcmp_ordered(">", value, high), high, value)

    def keep_where(self, value: Any, mask: Any) -> Any:
        """Set the lanes to +0 whose mask is 0; NaN too, which a product would keep."""
        b = self.builder
        return b.bitcast(b.and_(b.bitcast(value, self.width.bits), mask), value.type)

    def intrinsic(self, name: str) -> Any:
        """Return one of LLVM's own functions of one vector."""
        vector = self.width.vector
        full = f"{name}.v{self.width.lanes}f32"
        if full not in self.module.globals:
            ir.Function(self.module, ir.FunctionType(vector, [vector]), full)
        return self.module.globals[full]

    # -- control flow

    @contextlib.contextmanager
    def loop(self, start: Any, stop: Any, carried: Sequence[Any] = (), *, step: int = 1) -> Iterator[Loop]:
        """Repeat the block for start, start + step, … below stop; ``carried`` values pass from turn to turn."""
        b, function = self.builder, self.function
        head, body, after = (function.append_basic_block(name) for name in ("head", "body", "after"))
        before = b.block
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(start, before)
        values = []
        for value in carried:
            phi = b.phi(value.type)
            phi.add_incoming(value, before)
            values.append(phi)
        b.cbranch(b.icmp_signed("<", index, stop), body, after)
        b.position_at_end(body)
        turn = Loop(index, values)
        yield turn
        index.add_incoming(b.add(index, i64(step)), b.block)
        for phi, value in zip(values, turn.next or values, strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(after)

    def either(self, condition: Any, yes: Any, no: Any) -> list[Any]:
        """Branch; ``yes`` and ``no`` are functions that return equally many values, of which one side's are used."""
        b, function = self.builder, self.function
        blocks = [function.append_basic_block(name) for name in ("yes", "no", "joined")]
        b.cbranch(condition, *blocks[:2])
        ends, values = [], []
        for block, side in zip(blocks, (yes, no), strict=False):
            b.position_at_end(block)
            values.append(side())
            ends.append(b.block)
            b.branch(blocks[2])
        b.position_at_end(blocks[2])
        joined = []
        for first, second in zip(*values, strict=True):
            phi = b.phi(first.type)
            phi.add_incoming(first, ends[0])
            phi.add_incoming(second, ends[1])
            joined.append(phi)
        return joined

    @contextlib.contextmanager
    def repeat(self) -> Iterator[Callable[[Any], None]]:
        """Repeat the block until the function that it is given is called with a condition that holds."""
        b = self.builder
        body, after = (self.function.append_basic_block(name) for name in ("again", "left"))
        b.branch(body)
        b.position_at_end(body)

        def leave(condition: Any) -> None:
            stay = self.function.append_basic_block("stay")
            b.cbranch(condition, after, stay)
            b.position_at_end(stay)

        yield leave
        b.branch(body)
        b.position_at_end(after)

    def call(self, code: Any, parameters: Sequence[Any], arguments: Sequence[Any]) -> None:
        """Call the function at the address ``code``, an integer."""
        function = self.builder.inttoptr(code, _CodePointer(ir.FunctionType(VOID, parameters)))
        self.builder.call(function, arguments)

    def is_set(self, value: Any) -> Any:
        """Compare an integer or an address with 0."""
        if isinstance(value.type, ir.PointerType):
            value = self.builder.ptrtoint(value, I64)
        return self.builder.icmp_signed("!=", value, ir.Constant(value.type, 0))

    def minimum(self, a: Any, b: Any) -> Any:
        """Return the smaller of two signed integers."""
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def maximum(self, a: Any, b: Any) -> Any:
        """Return the larger of two signed integers."""
        return self.builder.select(self.builder.icmp_signed(">", a, b), a, b)

    def finish(self) -> None:
        """End the function."""
        self.builder.ret_void()


@dataclass
class Loop:
    """One turn of a loop; ``next`` takes the carried values of the following turn."""

    index: Any
    values: list[Any]
    next: list[Any] | None = None


class _CodePointer(ir.PointerType):  # type: ignore[misc]
    """An opaque pointer of which Python, not LLVM, knows the type of the function that it points to."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.pointee = kind
