"""A GPU for machines without one: tensors that say they are on cuda:0 and compute their values on the CPU.

Inside ``with EmulatedGpu() as gpu:`` the project runs as on a machine with one GPU. What a run on the
CPU cannot show raises :class:`GpuError`:

* an operation on tensors of both devices (single values of the host may join, as in CUDA), or ``numpy()``
  of a tensor of the device;
* a collective of a tensor on the host, of a type that NCCL lacks, or of a tensor with gaps;
* host memory that is written while an asynchronous copy from it may still be running. (What is copied to the
  host has other values until such a copy is over.)

And it counts, for a block of code (:meth:`EmulatedGpu.counting`): every place where the host waits for
the device, with its file and line, and the operations that the device is asked for. A wait for an event
counts apart if the device has more to do after it, because it is then not idle.

What it cannot show: speed, the order of streams (an operation is over when it is asked for), autocast
(torch's C++ sees the CPU), DeepSpeed, and DistributedDataParallel. Rounding is the CPU's.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

ROOT = Path(__file__).parents[2]
OWN = tuple(str(ROOT / folder) for folder in ("pipeline", "launchers", "benchmarks"))
DEVICE = torch.device("cuda", 0)
# Operations that make views, or memory without content: the device does nothing for them.
VIEWS = """
    view _unsafe_view reshape _reshape_alias as_strided detach alias permute transpose t movedim select slice split
    split_with_sizes unbind expand squeeze unsqueeze narrow unfold diagonal lift_fresh is_same_size view_as_real
    empty empty_like new_empty empty_strided new_empty_strided
"""
# Operations whose result, or its size, the host must know.
READ = """
    _local_scalar_dense nonzero masked_select equal is_nonzero bincount repeat_interleave _unique2 unique_dim
    unique_consecutive multinomial
"""
FREE, READS = frozenset((*VIEWS.split(), "_local_scalar_dense")), frozenset(READ.split())
BY_INDEX = frozenset(("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"))
MOVES = frozenset(("copy_", "_to_copy", "lift_fresh", "set_", "_foreach_copy_"))
MAKE_TENSOR = frozenset(("tensor", "as_tensor", "asarray", "scalar_tensor"))
NCCL_TYPES = frozenset(
    getattr(torch, name)
    for name in "bool uint8 int8 int32 int64 float16 bfloat16 float32 float64".split()  # noqa: SIM905
)


class GpuError(RuntimeError):
    """What would fail, or be wrong, on a GPU."""


@dataclass(frozen=True)
class Wait:
    """One time that the host waits for the device."""

    kind: str
    place: str  # the innermost line of the project, "pipeline/sparse/masks.py:41 pack_masks"

    def __str__(self) -> str:
        return f"{self.kind} at {self.place}"


@dataclass
class Count:
    """What a block of code asked of the device."""

    waits: list[Wait] = field(default_factory=list)
    events: list[Wait] = field(default_factory=list)  # waits for a part of the work; the device has more to do
    operations: Counter[str] = field(default_factory=Counter)  # by name, without those that are FREE

    @property
    def num_operations(self) -> int:
        """Number of operations, each of which is at least one launch of a kernel."""
        return sum(self.operations.values())


@dataclass(frozen=True)
class _Flight:
    """An asynchronous copy that may still be reading its source."""

    source: Tensor
    digest: str
    place: str


class GpuTensor(Tensor):
    """A tensor that says it is on cuda:0; ``held`` has its values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> GpuTensor:
        made: GpuTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cpu"),
            requires_grad=inner.requires_grad,
        )
        made.held = inner.detach()
        return made

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def record_stream(self, stream: Any) -> None:
        """Do nothing: memory is not used again while Python refers to it."""

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GpuTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        _note(name, func, args, kwargs)
        out = func(*_held(args), **_held(kwargs))
        if name.endswith("_") and not name.startswith("_"):
            if isinstance(args[0], GpuTensor) and args[0].shape != args[0].held.shape:
                raise NotImplementedError(f"{name} changes the shape of an emulated tensor in place")
            return args[0]
        if "out" in kwargs:
            return kwargs["out"]
        if out is None or (name.startswith(("_foreach", "_fused")) and name.endswith("_")):
            return None
        return _on_device(out)


def _note(name: str, func: Any, args: Any, kwargs: Any) -> None:
    """Check the devices of an operation and count it."""
    gpu = EmulatedGpu.current
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    on_host = [tensor for tensor in tensors if not isinstance(tensor, GpuTensor)]
    if name == "copy_" and on_host and gpu is not None:
        is_async = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if not isinstance(args[0], GpuTensor):
            gpu.wait("copy to the host")
        elif not args[1].dim():
            pass  # a single value is an argument of a kernel
        elif is_async:
            gpu.in_flight(args[1])
        else:
            gpu.wait("copy to the device")
    elif name not in MOVES | BY_INDEX and any(tensor.dim() for tensor in on_host):  # indices may be on the host
        raise GpuError(f"{func}: expected all tensors on one device, got cuda:0 and cpu, at {place()}")
    if gpu is None:
        return
    if name not in FREE:
        gpu.ask(name)
    if name in READS:
        gpu.wait(name)
    if name in BY_INDEX:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        if any(not isinstance(index, GpuTensor) for index in indices):
            gpu.wait(f"{name} by indices of the host")
        elif any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            gpu.wait(f"{name} by mask")


def place() -> str:
    """Return file, line and function of the innermost frame of the project."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(OWN):
            return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "no line of the project"


class EmulatedGpu(TorchFunctionMode):
    """Emulates one GPU inside its block."""

    current: EmulatedGpu | None = None

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()
        self.num_asked = 0  # operations since the start
        self._flights: list[_Flight] = []
        self._arriving: list[tuple[Tensor, Tensor]] = []  # memory of the host, and what is being copied into it
        self._patches = contextlib.ExitStack()

    # -- counting

    @contextlib.contextmanager
    def counting(self) -> Iterator[Count]:
        """Count what the block asks of the device."""
        before, self.count = self.count, Count()
        try:
            yield self.count
        finally:
            self.count = before

    def ask(self, operation: str) -> None:
        """Note that the device is asked for an operation."""
        self.count.operations[operation] += 1
        self.num_asked += 1

    def wait(self, kind: str) -> None:
        """Note that the host waits for the device, which is then idle."""
        self.count.waits.append(Wait(kind, place()))
        self.land()

    def in_flight(self, source: Tensor) -> None:
        """Note that the device may read ``source`` until the host waits for it."""
        self._flights.append(_Flight(source, _digest(source), place()))

    def land(self) -> None:
        """All copies are over: check that nothing has written to their sources meanwhile.

        Raises:
            GpuError: something has.
        """
        for here, value in self._arriving:
            with torch._C.DisableTorchFunction():
                here.copy_(value)
        self._arriving = []
        flights, self._flights = self._flights, []
        for flight in flights:
            if _digest(flight.source) != flight.digest:
                raise GpuError(f"race: the source of the copy at {flight.place} was written before the copy was over")

    # -- functions that move tensors or make them

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if isinstance(first, GpuTensor) and name in ON_DEVICE:
            return ON_DEVICE[name](self, first)
        if name in ("to", "cuda", "type_as") and isinstance(first, Tensor):
            return self._move(name, first, args[1:], kwargs)
        if name == "pin_memory":
            return first
        device = kwargs.get("device")
        if device is None or func is torch.device:
            return func(*args, **kwargs)
        if torch.device(device).type != "cuda":  # made on the host or on meta, maybe like a tensor of the device
            return func(*_held(args), **kwargs)
        if name in MAKE_TENSOR:
            if isinstance(first, GpuTensor):
                return first.to(kwargs.get("dtype") or first.dtype)
            self.wait(f"{name} of values of the host")
        requires_grad = kwargs.pop("requires_grad", False)
        made = func(*_held(args), **{**_held(kwargs), "device": "cpu"})
        return GpuTensor(made).requires_grad_(requires_grad)

    def _move(self, name: str, tensor: Tensor, rest: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Tensor.to, Tensor.cuda and Tensor.type_as."""
        device: Any = "cuda" if name == "cuda" else None
        dtype: torch.dtype | None = None
        flags: list[bool] = []
        for argument in rest:
            if isinstance(argument, Tensor):
                device, dtype = argument.device, argument.dtype
            elif isinstance(argument, torch.dtype):
                dtype = argument
            elif isinstance(argument, bool):
                flags.append(argument)
            elif argument is not None:
                device = argument
        is_async, copies = (*flags, False, False)[:2]
        is_async, copies = kwargs.pop("non_blocking", is_async), kwargs.pop("copy", copies)
        device, dtype = kwargs.pop("device", device), kwargs.pop("dtype", dtype)
        kind = ("cuda" if isinstance(tensor, GpuTensor) else "cpu") if device is None else torch.device(device).type
        if kind == "meta":
            return _held(tensor).to("meta", dtype or tensor.dtype, **kwargs)
        is_moved = (kind == "cuda") != isinstance(tensor, GpuTensor)
        if is_moved:
            self.ask("copy")
            copy = _copy(tensor)
            if not is_async:
                self.wait("copy to the device" if kind == "cuda" else "copy to the host")
            elif kind == "cuda":
                self.in_flight(tensor)
            else:
                copy = self._arrives(copy)
            moved = GpuTensor(copy) if kind == "cuda" else copy
            tensor = moved.requires_grad_(tensor.requires_grad and tensor.is_leaf)
        with torch._C.DisableTorchFunction():
            return Tensor.to(tensor, dtype or tensor.dtype, copy=copies and not is_moved, **kwargs)

    def _arrives(self, value: Tensor) -> Tensor:
        """Return memory of the host that will have ``value`` once the copy is over."""
        with torch._C.DisableTorchFunction():
            here = torch.full_like(value, 1 if value.dtype == torch.bool else 77)
        self._arriving.append((here, value))
        return here

    # -- torch.cuda and the collectives

    def __enter__(self) -> EmulatedGpu:
        EmulatedGpu.current = self
        for name, value in _cuda(self).items():
            self._patches.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, positions in COLLECTIVES.items():
            self._patches.enter_context(mock.patch.object(dist, name, _checked(getattr(dist, name), positions)))
        # it asks the driver
        asks = "_accelerator_graph_capture_health_check"
        if hasattr(torch.optim.Optimizer, asks):
            self._patches.enter_context(mock.patch.object(torch.optim.Optimizer, asks, lambda _: None))
        # torch's C++ would say that the tensors are on the CPU
        by_device = "_group_tensors_by_device_and_dtype"
        for owner in (sys.modules["torch.nn.utils.clip_grad"], torch.optim.Optimizer):
            grouped = staticmethod(_grouped_by_device(getattr(owner, by_device)))
            self._patches.enter_context(mock.patch.object(owner, by_device, grouped))
        # so that Module.to makes new parameters, because the type of a tensor cannot change in place
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        self._patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patches.close()
        EmulatedGpu.current = None
        if error[0] is None:
            self.land()


def _refuse_numpy(_gpu: EmulatedGpu, _tensor: GpuTensor) -> Any:
    raise GpuError(f"numpy: cannot convert a tensor on cuda:0, at {place()}")


def _tolist(gpu: EmulatedGpu, tensor: GpuTensor) -> Any:
    gpu.wait("tolist")
    return tensor.held.tolist()


def _cpu(gpu: EmulatedGpu, tensor: GpuTensor) -> Tensor:
    gpu.ask("copy")
    gpu.wait("copy to the host")
    return _copy(tensor)


def _deepcopy(_gpu: EmulatedGpu, tensor: GpuTensor) -> Tensor:
    made = GpuTensor(_copy(tensor))
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(made, tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)


ON_DEVICE: dict[str, Callable[[EmulatedGpu, GpuTensor], Any]] = {
    "numpy": _refuse_numpy,
    "__array__": _refuse_numpy,
    "tolist": _tolist,
    "cpu": _cpu,
    "__deepcopy__": _deepcopy,
    "untyped_storage": lambda _, tensor: tensor.held.untyped_storage(),
    "data_ptr": lambda _, tensor: tensor.held.data_ptr(),
}


def _grouped_by_device(group: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``_group_tensors_by_device_and_dtype`` with the emulated device in its keys."""

    def call(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        groups = group(tensors, *args, **kwargs)
        at = DEVICE if any(isinstance(tensor, GpuTensor) for tensor in tensors[0]) else torch.device("cpu")
        return {(at, dtype): found for (_, dtype), found in groups.items()}

    return call


def _held(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.held if isinstance(leaf, GpuTensor) else leaf, tree)


def _on_device(tree: Any) -> Any:
    return tree_map(lambda leaf: GpuTensor(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _copy(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return (tensor.held if isinstance(tensor, GpuTensor) else tensor).detach().clone()


def _digest(tensor: Tensor) -> str:
    with torch._C.DisableTorchFunction():
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return hashlib.sha256(content.numpy().tobytes()).hexdigest()


# The collectives, with the positions of the arguments that are tensors or lists of tensors.
COLLECTIVES = {
    "all_reduce": (0,),
    "broadcast": (0,),
    "all_gather": (0, 1),
    "gather": (0, 1),
    "send": (0,),
    "recv": (0,),
}


def _checked(collective: Callable[..., Any], positions: Sequence[int]) -> Callable[..., Any]:
    """Return the collective for tensors of the device, with NCCL's rules; gloo carries it out."""

    def call(*args: Any, **kwargs: Any) -> Any:
        for position in positions:
            for tensor in tree_flatten(args[position] if position < len(args) else None)[0]:
                if tensor is not None and (broken := _broken_rule(tensor)):
                    raise GpuError(f"{collective.__name__}: {broken}, at {place()}")
        with torch._C.DisableTorchFunction():
            return collective(*_held(args), **_held(kwargs))

    return call


def _broken_rule(tensor: Tensor) -> str:
    if not isinstance(tensor, GpuTensor):
        return "NCCL has no collectives of tensors on the host"
    if tensor.dtype not in NCCL_TYPES:
        return f"NCCL has no {tensor.dtype}"
    is_whole = tensor.held.is_contiguous() or (
        tensor.dim() == 4 and tensor.held.is_contiguous(memory_format=torch.channels_last)
    )
    return "" if is_whole else "NCCL needs a tensor without gaps"


def _cuda(gpu: EmulatedGpu) -> dict[str, Any]:
    """Return what stands in for functions and classes of torch.cuda."""

    class Event:
        num_asked: int | None = None  # operations of the device before it; None: it is in a stream of copies

        def synchronize(self) -> None:
            if self.num_asked == gpu.num_asked:
                gpu.wait("Event.synchronize")
            elif self.num_asked is not None:
                gpu.count.events.append(Wait("Event.synchronize", place()))
            gpu.land()

        def wait(self, *_: object) -> None:
            pass

        def query(self) -> bool:
            return True

    class Stream:
        device = DEVICE

        def __init__(self, *_: object, is_computing: bool = False) -> None:
            self.is_computing = is_computing

        def record_event(self, *_: object) -> Event:
            event = Event()
            event.num_asked = gpu.num_asked if self.is_computing else None
            return event

        def synchronize(self) -> None:
            gpu.wait("Stream.synchronize")

        def wait_stream(self, *_: object) -> None:
            pass

        def wait_event(self, *_: object) -> None:
            pass

    properties = SimpleNamespace(name="emulated GPU", total_memory=1 << 30, uuid="emulated")
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: None,
        "manual_seed_all": lambda _: None,
        "synchronize": lambda *_: gpu.wait("torch.cuda.synchronize"),
        "current_stream": lambda *_: Stream(is_computing=True),
        "stream": lambda _: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Event,
    }
