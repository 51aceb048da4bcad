"""All kernels of this version, compiled for one processor: the same for every network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llvmlite import ir

from pipeline.inference import kernels, plain_kernels, runner
from pipeline.inference.jit import Code, Processor, compile_ir

LINEAR_GROUPS = (1, 4, 8)  # outputs that one entry of a linear layer holds


def inner_ir(processor: Processor) -> str:
    """Print the IR of the convolution and linear kernels and of the loop over a program, which is the same for all."""
    module = _module(processor)
    kernels.convolution(module, processor.width)
    for group in LINEAR_GROUPS:
        kernels.linear(module, processor.width, group)
    runner.run(module, processor.width, processor.architecture)
    return str(module)


def plain_ir(processor: Processor, needed: Iterable[str]) -> str:
    """Print the IR of the other kernels, those that are named."""
    module = _module(processor)
    for name in sorted(needed):
        kind, _, shape = name.partition("_")
        numbers = [int(number) for number in shape.split("x")] if shape[:1].isdigit() else []
        if kind == "copy":
            plain_kernels.copy(module, processor.width, *numbers)
        elif kind in ("max", "average"):
            plain_kernels.pool(module, processor.width, kind, *numbers)
        elif name == "mean":
            plain_kernels.mean(module, processor.width)
        elif name == "add":
            plain_kernels.add(module, processor.width)
        else:
            function, _, form = name.rpartition("_")
            plain_kernels.pointwise(module, processor.width, function, is_by_lane=form == "lanes")
    return str(module)


def _module(processor: Processor) -> Any:
    module = ir.Module("ticketworks")
    module.triple = processor.triple
    return module


@dataclass(frozen=True)
class Library:
    """The compiled kernels that a network needs."""

    inner: Code
    plain: Code

    def address(self, name: str) -> int:
        """Return the address of a kernel."""
        is_inner = name.startswith(("tile_", "linear_")) or name in ("convolution", "run")
        return (self.inner if is_inner else self.plain).address(name)


def library(processor: Processor, needed: Iterable[str]) -> Library:
    """Compile the inner kernels, and the named ones of the others."""
    names = sorted(needed)
    digest = hashlib.sha256("\n".join([version(), *names]).encode()).hexdigest()[:24]
    plain = compile_ir(f"plain-{digest}", lambda: plain_ir(processor, names), processor, is_optimized=True)
    return Library(_inner(processor), plain)


@cache
def version() -> str:
    """Digest of this package's source: of another one, nothing in the cache counts."""
    sha = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:24]


@cache
def _inner(processor: Processor) -> Code:
    # printed as LLVM would optimise it: only the code generator has work to do
    return compile_ir(f"inner-{version()}", lambda: inner_ir(processor), processor, is_optimized=False)
