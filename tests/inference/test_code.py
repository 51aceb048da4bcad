"""The same kernels become the right instructions for every processor, and the sums of a tile stay in registers."""

from __future__ import annotations

import re

import pytest

from pipeline.errors import ServiceError
from pipeline.inference import jit
from pipeline.inference.jit import AVX2, AVX512, NEON, Processor
from pipeline.inference.kernel_set import inner_ir, plain_ir
from pipeline.inference.kernels import tile_sizes

LINUX = "unknown-linux-gnu"
PROCESSORS = {
    "AVX2": (Processor(f"x86_64-{LINUX}", "haswell", "", AVX2), r"vfmadd231ps.*%ymm", "rsp"),
    "AVX-512": (Processor(f"x86_64-{LINUX}", "skylake-avx512", "-prefer-256-bit", AVX512), r"vfmadd231ps.*%zmm", "rsp"),
    "NEON": (Processor(f"aarch64-{LINUX}", "neoverse-n1", "", NEON), r"fmla\tv\d+\.4s", "sp"),
}


def test_a_system_that_is_not_known_is_refused_by_name() -> None:
    for processor, _, _ in PROCESSORS.values():
        jit.require_known(processor.triple)
    for triple in ("arm64-apple-darwin23.1.0", "x86_64-apple-darwin", "x86_64-pc-windows-msvc", "riscv64-linux-gnu"):
        with pytest.raises(ServiceError, match=f"on Linux on x86-64 or .* not on {triple}"):
            jit.require_known(triple)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_tile_multiplies_and_adds_in_registers(name: str) -> None:
    processor, multiply_add, stack = PROCESSORS[name]
    text = jit.assembly(inner_ir(processor), processor, is_optimized=False)
    for group, sizes in tile_sizes(processor.width).items():
        function = text.split(f"\ntile_{group}x{sizes[-1]}:")[1].split("\n.Lfunc_end")[0]
        blocks = re.split(r"\n(?=\.LBB)", function)
        inner = max(blocks, key=lambda block: len(re.findall(multiply_add, block)))
        assert len(re.findall(multiply_add, inner)) >= group * sizes[-1]
        assert not re.search(rf"\[{stack}|\(%{stack}\)", inner), f"{name}, {group} rows: sums are in memory"


def test_the_other_kernels_become_code_for_arm() -> None:
    processor, multiply_add, _ = PROCESSORS["NEON"]
    names = {"copy_2", "max_3x2", "average_2x2", "mean", "add", "silu_planes", "gelu_lanes"}
    text = plain_ir(processor, names)
    content = jit.object_file(text, processor, is_optimized=True)
    assert content[:4] == b"\x7fELF"
    assert int.from_bytes(content[18:20], "little") == 183  # EM_AARCH64
    assert all(name.encode() in content for name in names)
    assert re.search(multiply_add, jit.assembly(text, processor, is_optimized=True))
