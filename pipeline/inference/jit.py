"""Compile LLVM IR for this processor, and keep the machine code in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from pipeline.errors import ServiceError
from pipeline.inference import cache as folder
from pipeline.inference.emit import Width
from pipeline.inference.runner import FUTEX

AVX512 = Width(16, 32)
AVX2 = Width(8, 16)
NEON = Width(4, 32)
PORTABLE = Width(4, 16)

_lock = threading.Lock()


@dataclass(frozen=True)
class Processor:
    """What code is compiled for: LLVM's names, and the width of vectors."""

    triple: str
    name: str
    features: str
    width: Width

    @property
    def architecture(self) -> str:
        """Such as x86_64."""
        return self.triple.split("-")[0]

    @property
    def key(self) -> str:
        """Digest of everything that the machine code depends on beside its IR."""
        text = "\n".join((self.triple, self.name, self.features, str(self.width.lanes), "1", llvmlite.__version__))
        return hashlib.sha256(text.encode()).hexdigest()[:24]


@cache
def host(lanes: int = 0) -> Processor:
    """Describe this processor.

    Args:
        lanes: floats in a vector; 0: as many as the processor's registers have. A test may force
            another width, which LLVM splits or leaves partly unused.

    Raises:
        ServiceError: it is not one of those that sparse inference runs on.
    """
    initialize()
    require_known(llvm.get_process_triple())
    known = llvm.get_host_cpu_features()
    width = width_of(llvm.get_process_triple(), known)
    features = known.flatten()
    if width is AVX512:
        features += ",-prefer-256-bit"
    if lanes:
        if width is AVX512 and lanes < width.lanes:  # as a processor without AVX-512
            features = ",".join(each for each in features.split(",") if "avx512" not in each) + ",-avx512f"
            width = AVX2
        width = Width(lanes, width.registers)
    return Processor(llvm.get_process_triple(), llvm.get_host_cpu_name(), features, width)


def require_known(triple: str) -> None:
    """Refuse a system on which threads cannot wait for one another as the compiled code does.

    Args:
        triple: LLVM's name of processor and system, such as ``x86_64-unknown-linux-gnu``.

    Raises:
        ServiceError: it is not Linux on x86-64 or 64-bit ARM.
    """
    if triple.split("-")[0] not in FUTEX or "-linux" not in triple:
        raise ServiceError(
            f"sparse inference runs on Linux on x86-64 or 64-bit ARM (aarch64), not on {triple}",
            do="evaluate without --sparse, or load the ticket with pipeline.inference.load_ticket",
        )


def width_of(triple: str, features: Any) -> Width:
    """Choose the vectors for a processor from its LLVM features."""
    if triple.startswith(("aarch64", "arm64")):
        return NEON
    if features.get("avx512f") and features.get("avx512vl"):
        return AVX512
    return AVX2 if features.get("avx2") and features.get("fma") else PORTABLE


@cache
def initialize() -> None:
    """Prepare LLVM; no more than once a process."""
    try:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    except RuntimeError as error:  # pragma: no cover - a broken installation
        raise ServiceError(f"llvmlite cannot compile: {error}", do="python -m pip install llvmlite") from None


def target_machine(processor: Processor) -> Any:
    """Return LLVM's code generator for a processor."""
    initialize()
    target = llvm.Target.from_triple(processor.triple)
    return target.create_target_machine(
        cpu=processor.name, features=processor.features, opt=3, jit=True, reloc="default", codemodel="jitdefault"
    )


def _parsed(text: str, processor: Processor, is_optimized: bool) -> Any:
    module = llvm.parse_assembly(text)
    module.triple = processor.triple
    module.verify()
    if not is_optimized:
        return module
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization, tuning.slp_vectorization, tuning.loop_unrolling = True, False, False
    builder = llvm.create_pass_builder(target_machine(processor), tuning)
    builder.getModulePassManager().run(module, builder)
    return module


@dataclass
class Code:
    """Functions in machine code; their addresses are valid as long as this object lives."""

    engine: Any
    addresses: dict[str, int] = field(default_factory=dict)

    def address(self, name: str) -> int:
        """Return the address of a function."""
        if name not in self.addresses:
            self.addresses[name] = int(self.engine.get_function_address(name))
        assert self.addresses[name], name
        return self.addresses[name]

    def function(self, name: str, *kinds: Any) -> Any:
        """Return a function that Python can call; other Python threads run meanwhile."""
        return ctypes.CFUNCTYPE(None, *kinds)(self.address(name))


def compile_ir(name: str, text: Callable[[], str], processor: Processor, *, is_optimized: bool) -> Code:
    """Compile IR, or take the machine code from the cache.

    Args:
        name: of the cached code, which decides what the IR is.
        text: returns the IR; it is not asked if there is code in the cache.
        processor: what it is compiled for; to call it, it must be this one.
        is_optimized: run LLVM's optimisations, which make vectors of plain loops.
    """
    with _lock:
        name = f"code-{processor.key}-{name}"
        found = folder.load(name)
        if found is not None:
            try:
                return _link(found, processor)
            except RuntimeError:  # it is not an object file
                folder.forget(name)
        content = object_file(text(), processor, is_optimized=is_optimized)
        folder.save(name, content)
        return _link(content, processor)


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)  # another thread may have held it when this process was forked


def object_file(text: str, processor: Processor, *, is_optimized: bool) -> bytes:
    """Compile IR for any processor; returns an object file."""
    return bytes(target_machine(processor).emit_object(_parsed(text, processor, is_optimized)))


def assembly(text: str, processor: Processor, *, is_optimized: bool) -> str:
    """Return the assembly of IR, for tests that look for instructions."""
    return str(target_machine(processor).emit_assembly(_parsed(text, processor, is_optimized)))


def _link(content: bytes, processor: Processor) -> Code:
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine(processor))
    engine.add_object_file(llvm.ObjectFileRef.from_data(content))
    engine.finalize_object()
    return Code(engine)
