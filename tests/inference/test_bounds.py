"""Compiled code touches no byte that is not its own: memory stands against pages that end the process."""

from __future__ import annotations

import copy
import ctypes
import faulthandler
import mmap
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.inference import program
from pipeline.inference.build import build_engine
from pipeline.inference.engine import Arena, Engine
from pipeline.inference.jit import host
from pipeline.inference.pack import Packed, pack
from tests.inference.random_networks import random_network

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(num_bytes: int, *, at_end: bool) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Zero bytes between two pages that may not be touched; they reach one of both, but for the rest of 64 bytes."""
    size = -(-num_bytes // PAGE) * PAGE
    memory = np.frombuffer(mmap.mmap(-1, size + 2 * PAGE), np.uint8)
    for place in (0, size + PAGE):
        failed = _libc.mprotect(ctypes.c_void_p(memory.ctypes.data + place), ctypes.c_size_t(PAGE), 0)
        assert failed == 0, ctypes.get_errno()
    start = PAGE + (size - num_bytes if at_end else 0)
    return memory[start : start + num_bytes]


def copied(array: np.ndarray[Any, Any], *, at_end: bool) -> np.ndarray[Any, Any]:
    copied = guarded(max(array.nbytes, 4), at_end=at_end)[: array.nbytes].view(array.dtype).reshape(array.shape)
    copied[...] = array
    return copied


class GuardedArena(Arena):
    def __init__(self, num_floats: int, *, at_end: bool) -> None:
        self.floats = guarded(num_floats * 4, at_end=at_end).view(np.float32)
        self.address = int(self.floats.ctypes.data)


def survives(work: Callable[[], None]) -> bool:
    """Run ``work`` in a fork, which a forbidden access ends."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # pytest would print where it ended
        try:
            work()
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def test_the_guard_ends_a_process_that_goes_beyond() -> None:
    def write(place: int, at_end: bool) -> None:
        memory = guarded(128, at_end=at_end)
        ctypes.memset(memory.ctypes.data + place, 1, 1)

    assert not survives(lambda: write(128, at_end=True))
    assert not survives(lambda: write(-1, at_end=False))
    assert survives(lambda: write(127, at_end=True))
    assert survives(lambda: write(0, at_end=False))


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_no_layer_reads_or_writes_out_of_bounds(lanes: int, at_end: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def guarded_pack(*given: Any, **options: Any) -> Packed:
        packed = pack(*given, **options)
        return replace(packed, entries=copied(packed.entries, at_end=at_end))

    monkeypatch.setattr(program, "pack", guarded_pack)

    def run(engine: Engine, images: torch.Tensor) -> None:
        arena = GuardedArena(engine.program.arena_floats, at_end=at_end)
        given = copied(images.numpy(), at_end=at_end)
        output = copied(np.zeros((len(images), *engine.output_shape), np.float32), at_end=at_end)
        engine.run(arena, given, output, 0, engine.num_records, len(images))
        assert np.array_equal(output, engine(images.numpy(), 1))

    for seed in range(50_000 + 1000 * lanes, 50_000 + 1000 * lanes + 4):
        model, images, description = random_network(seed)
        shape = tuple(images.shape[1:])
        engine = build_engine(
            copy.deepcopy(model).to("meta"), shape, model.state_dict(), {}, processor=host(lanes), threads=1
        )  # type: ignore[arg-type]
        assert survives(lambda engine=engine, images=images: run(engine, images)), description
