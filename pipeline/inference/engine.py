"""Run a program: one image after the other, on one thread or several, with torch's steps between."""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from pipeline.inference.graph import FromTorch, Graph, Operation, Planes, Step, TorchStep, ToTorch
from pipeline.inference.kernel_set import Library
from pipeline.inference.layout import LINE
from pipeline.inference.program import Program
from pipeline.inference.records import RECORD_FIELDS
from pipeline.inference.runner import num_counters
from pipeline.inference.trace import Held, Value
from pipeline.memory import in_huge_pages

Floats = npt.NDArray[np.float32]
_P, _I = ctypes.c_void_p, ctypes.c_int64


class Helpers:
    """Threads of this process that help with one call at a time. A fork starts without them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.executor = ThreadPoolExecutor(count, "sparse") if count else None
        self.busy = threading.Lock()

    def start(self, work: Callable[[int], None]) -> list[Future[None]]:
        """Let every helper call ``work`` with its number, from 1."""
        assert self.executor is not None
        return [self.executor.submit(work, number) for number in range(1, self.count + 1)]


_helpers: dict[int, Helpers] = {}
os.register_at_fork(after_in_child=_helpers.clear)


def helpers(count: int) -> Helpers:
    """Return the process's helpers."""
    if count not in _helpers:
        _helpers[count] = Helpers(count)
    return _helpers[count]


class Arena:
    """The memory of one call: all planes, zero where nothing is written."""

    def __init__(self, num_floats: int) -> None:
        self.floats: Floats = in_huge_pages(num_floats * 4).view(np.float32)
        self.address = int(self.floats.ctypes.data)

    @property
    def tensor(self) -> Tensor:
        """The same memory as a torch tensor."""
        return torch.from_numpy(self.floats)


class Engine:
    """A program that can be called, from several threads at once.

    Args:
        graph: the network.
        program: its records.
        library: its kernels.
        state: the network's tensors, of which those are kept that torch's steps read.
    """

    def __init__(self, graph: Graph, program: Program, library: Library, state: Mapping[str, Tensor]) -> None:
        self.graph, self.program, self.kernel_set = graph, program, library
        pointers = [_P, _I, _P, _P, _P, _I, _I, _I, _I, _I, _P]
        self._run = ctypes.CFUNCTYPE(None, *pointers)(library.address("run"))
        self.steps = program.expanded.steps
        self.held = {name: state[name] for step in self.steps if isinstance(step, TorchStep) for name in _held_by(step)}
        self.num_records = len(program.operations)
        self.is_native = all(isinstance(step, Operation) for step in self.steps)
        self._free: list[Arena] = []  # of calls that have ended; list.pop and append need no lock
        self.output_shape = tuple(graph.output.shape[1:])
        self.torch_counts = Counter(
            step.operator.name for step in self.steps if isinstance(step, TorchStep) and not _is_view(step)
        )

    def __call__(self, images: Floats, threads: int) -> Floats:
        """Run the network on images [N, C, H, W]; returns [N, …]."""
        num_images = images.shape[0]
        output = np.empty((num_images, *self.output_shape), np.float32)
        if num_images == 0:
            return output
        team = helpers(threads - 1) if threads > 1 else None
        if team is None or not team.busy.acquire(blocking=False):
            self._some(images, output)  # others use the helpers: this thread works alone
            return output
        try:
            if num_images >= threads:
                self._images_apart(team, images, output)
            else:
                for number in range(num_images):
                    self._one_together(team, images[number], output[number])
        finally:
            team.busy.release()
        return output

    def measured_run(self) -> Callable[[int], None]:
        """Return a function that runs one record, of which the tuner measures the time."""
        arena, none = self._arena(), np.zeros((1, 16), np.float32)
        return lambda number: self.run(arena, none, none, number, 1, 1)

    def drop_activations(self) -> None:
        """Give back the memory of activations that calls have left for later ones."""
        self._free.clear()

    def _some(self, images: Floats, output: Floats) -> None:
        arena = self._arena()
        if self.is_native:
            self.run(arena, images, output, 0, self.num_records, len(images))
        else:
            for number in range(len(images)):
                image, to = images[number], output[number]
                self._with_torch(arena, image, to, partial(self._alone, arena, image, to))
        self._free.append(arena)

    def _alone(self, arena: Arena, image: Floats, output: Floats, first: int, count: int) -> None:
        self.run(arena, image, output, first, count, 1)

    def _images_apart(self, team: Helpers, images: Floats, output: Floats) -> None:
        shares = np.array_split(np.arange(len(images)), team.count + 1)

        def work(number: int) -> None:
            part = slice(shares[number][0], shares[number][-1] + 1)
            self._some(images[part], output[part])

        _finish(team.start(work), lambda: work(0))

    def _one_together(self, team: Helpers, image: Floats, output: Floats) -> None:
        arena = self._arena()

        def run(first: int, count: int) -> None:
            num_threads = team.count + 1
            shared = np.zeros(num_counters(count, 1, num_threads), np.int64)

            def work(thread: int) -> None:
                self.run(arena, image, output, first, count, 1, num_threads, thread, shared)

            _finish(team.start(work), lambda: work(0))

        self._with_torch(arena, image, output, run)
        self._free.append(arena)

    def run(
        self,
        arena: Arena,
        images: Floats,
        output: Floats,
        first: int,
        count: int,
        num_images: int,
        num_threads: int = 1,
        thread: int = 0,
        shared: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Run records on this thread."""
        self._run(
            self.program.records.ctypes.data + first * RECORD_FIELDS * 8,
            count,
            arena.address,
            images.ctypes.data,
            output.ctypes.data,
            images.size // num_images,
            output.size // num_images,
            num_images,
            num_threads,
            thread,
            0 if shared is None else shared.ctypes.data,
        )

    def _with_torch(self, arena: Arena, image: Floats, output: Floats, run: Callable[[int, int], None]) -> None:
        """Run all steps on one image; ``run`` runs records from a first one on."""
        values: dict[Value, Any] = dict(self.graph.constants)
        values[next(v for v, (p, _) in self.graph.planes.items() if p is self.graph.image)] = torch.from_numpy(
            image[None]
        )
        record = first = 0
        for step in (*self.steps, None):
            if isinstance(step, Operation):
                record += 1
                continue
            if record > first:
                run(first, record - first)
                first = record
            if step is not None:
                self._torch_step(step, arena, values)
        if self.graph.output in values:
            output[...] = values[self.graph.output][0].numpy()

    def _torch_step(self, step: Step, arena: Arena, values: dict[Value, Any]) -> None:
        if isinstance(step, ToTorch):
            if step.value not in values:  # else it is the image
                values[step.value] = self.view(arena, step.source, step.value.shape, is_tokens=step.is_tokens)
        elif isinstance(step, FromTorch):
            shape = step.value.shape
            self.view(arena, step.output, shape, is_tokens=step.is_tokens).copy_(values[step.value])
        else:
            assert isinstance(step, TorchStep)
            operator = step.operator

            def real(item: Any) -> Any:
                if isinstance(item, Value):
                    return values[item]
                return self.held[item.name] if isinstance(item, Held) else item

            arguments, options = tree_map(real, (operator.arguments, operator.options))
            with torch.no_grad():
                result = operator.function(*arguments, **options)
            for value, each in zip(
                operator.outputs, result if isinstance(result, tuple | list) else [result], strict=True
            ):
                if value is not None:
                    values[value] = each

    def view(self, arena: Arena, planes: Planes, shape: tuple[int, ...], *, is_tokens: bool) -> Tensor:
        """Show planes as a tensor of a shape; a view of the arena."""
        layout = self.program.layouts[planes]
        flat = arena.tensor
        if is_tokens:
            tokens = flat.as_strided((planes.width, planes.channels), (1, layout.stride), layout.place)
            return tokens.as_strided(shape, (*_strides(shape[:-1]), layout.stride), layout.place)
        size = (planes.channels, planes.height, planes.width)
        view = flat.as_strided(size, (layout.stride, layout.row, 1), layout.place)
        return view[None] if len(shape) == 4 else view.reshape(shape)

    def _arena(self) -> Arena:
        try:
            return self._free.pop()
        except IndexError:
            return Arena(self.program.arena_floats + LINE)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[number + 1 :]) for number in range(len(shape)))


def _finish(futures: list[Future[None]], own: Callable[[], None]) -> None:
    """Do this thread's share, then wait for the others."""
    own()
    for future in futures:
        future.result()


def _held_by(step: TorchStep) -> list[str]:
    items = tree_flatten((step.operator.arguments, step.operator.options))[0]
    return [item.name for item in items if isinstance(item, Held)]


def _is_view(step: TorchStep) -> bool:
    returns = step.operator.function._schema.returns
    return any(item.alias_info is not None for item in returns)
