"""List the operators that a network runs, in order: its forward pass on the meta device, without computing.

The list is that of ATen, PyTorch's own operators, so every network that runs can be listed,
whatever modules it is written with. Operators that write in place get a new value for what they
wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from pipeline.errors import ConfigError

# What a network may raise for images that it does not take.
REFUSALS = (RuntimeError, ValueError, AssertionError, TypeError, IndexError, NotImplementedError, AttributeError)

# Operators whose output has the shape of their arguments.
POINTWISE = ("add", "relu", "relu6", "hardtanh", "clamp", "sigmoid", "tanh", "silu", "gelu", "hardsigmoid", "hardswish")


@dataclass(frozen=True)
class Value:
    """What an operator computes, or the images."""

    number: int
    shape: tuple[int, ...] = field(compare=False)


@dataclass(frozen=True)
class Held:
    """A parameter or buffer of the network, by its name in the state_dict."""

    name: str
    shape: tuple[int, ...] = field(compare=False)


@dataclass(frozen=True)
class Operator:
    """One call of an operator. Values and held tensors stand in its arguments instead of tensors."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    outputs: tuple[Value | None, ...]

    @property
    def name(self) -> str:
        """Such as ``convolution``; the form in place has the name of the other."""
        name = str(self.function.overloadpacket.__name__)
        return name.removesuffix("_") if not name.endswith("__") else name

    def inputs(self) -> Iterator[Value]:
        """The values among the arguments."""
        return (item for item in tree_flatten((self.arguments, self.options))[0] if isinstance(item, Value))


@dataclass(frozen=True)
class Listing:
    """All operators of a network that its output depends on, for one image."""

    image: Value
    operators: tuple[Operator, ...]
    output: Value


def list_operators(model: nn.Module, image_shape: tuple[int, ...]) -> Listing:
    """List the operators of a network on the meta device, for one image of the shape (C, H, W).

    Raises:
        ConfigError: the network does not take such images, or does not return one tensor.
    """
    model.eval()
    recorder = _Recorder(model)
    image = torch.empty(1, *image_shape, device="meta")
    value = recorder.new_value(image)
    try:
        with torch.no_grad(), recorder:
            output = model(image)
    except _CannotBeListed as error:
        raise ConfigError(f"the operators of this network cannot be listed: {error}", do="run it with torch") from None
    except REFUSALS as error:
        shape = "×".join(map(str, image_shape))
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"the network does not take images of {shape}: {reason[0] if reason else type(error).__name__}",
            do="use images of the size that it was trained with",
        ) from None
    if not isinstance(output, Tensor) or id(output) not in recorder.values:
        raise ConfigError("the network does not return one tensor", do="use a network that returns logits")
    result = recorder.values[id(output)]
    return Listing(value, tuple(_needed(recorder.operators, result)), result)


class _CannotBeListed(Exception):
    """The network does something that a list of operators cannot express."""


class _Recorder(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.held = {id(tensor): Held(name, tuple(tensor.shape)) for name, tensor in reversed(named)}
        self.values: dict[int, Value] = {}
        self.kept: list[Any] = [tensor for _, tensor in named]  # no other tensor takes the id of one of these
        self.by_storage: dict[int, set[int]] = {}
        self.stale: set[int] = set()  # tensors whose memory was overwritten through another one
        self.operators: list[Operator] = []
        self.num_values = 0

    def new_value(self, tensor: Tensor) -> Value:
        self.num_values += 1
        value = Value(self.num_values, tuple(tensor.shape))
        self.values[id(tensor)] = value
        self.kept.append(tensor)
        self.by_storage.setdefault(_storage(tensor), set()).add(id(tensor))
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments, options = tree_map(self._named, (tuple(args), dict(kwargs)))
        result = _result(func, args, kwargs)
        written = [
            args[number]
            for number, argument in enumerate(func._schema.arguments[: len(args)])
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(args[number], Tensor)
        ]
        for tensor in written:
            if id(tensor) in self.held:
                raise _CannotBeListed("it writes into its own weights")
            self.stale |= self.by_storage.get(_storage(tensor), set()) - {id(tensor)}
        tensors = result if isinstance(result, tuple | list) else [result]
        outputs = []
        for tensor in tensors:
            outputs.append(self.new_value(tensor) if isinstance(tensor, Tensor) else None)
        self.operators.append(Operator(func, arguments, options, tuple(outputs)))
        return result

    def _named(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        if id(item) in self.stale:
            raise _CannotBeListed("it reads a tensor after writing into another view of it")
        if id(item) in self.held:
            return self.held[id(item)]
        if id(item) not in self.values:
            raise _CannotBeListed("it makes a tensor whose origin is not known")
        return self.values[id(item)]


def _result(function: Any, arguments: Any, options: Any) -> Any:
    """Call an operator on the meta device.

    For some operators torch imports its compiler there, which takes seconds; the shapes of these are plain.
    """
    name = str(function.overloadpacket.__name__)
    others = [other for other in arguments[1:] if isinstance(other, Tensor)]
    if name.removesuffix("_") in POINTWISE and all(other.shape == arguments[0].shape for other in others):
        return arguments[0] if name.endswith("_") else torch.empty_like(arguments[0])
    if name == "native_batch_norm" and not arguments[5]:  # it is not training
        return torch.empty_like(arguments[0]), arguments[0].new_empty(0), arguments[0].new_empty(0)
    if name in ("mm", "addmm"):
        left, right = arguments[-2:]
        return left.new_empty(left.shape[0], right.shape[1])
    if name == "mean" and len(arguments) > 1 and arguments[1]:
        shape, is_kept = arguments[0].shape, len(arguments) > 2 and arguments[2]
        gone = {dimension % len(shape) for dimension in arguments[1]}
        sizes = [1 if number in gone else size for number, size in enumerate(shape) if is_kept or number not in gone]
        return arguments[0].new_empty(sizes)
    return function(*arguments, **options)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _needed(operators: list[Operator], output: Value) -> list[Operator]:
    wanted, found = {output}, []
    for each in reversed(operators):
        if wanted & set(each.outputs):
            found.append(each)
            wanted |= set(each.inputs())
    return found[::-1]
