"""Build networks by name: the papers' CIFAR networks, torchvision's classifiers, and timm's as ``timm/NAME``."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline import parts
from pipeline.errors import ConfigError, DataError
from pipeline.models import cifar
from pipeline.models.cifar import CIFAR_MODELS
from pipeline.models.names import TIMM

# Without auxiliary classifiers, these return a single tensor in training as well.
TORCHVISION_DEFAULTS = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}

# Prefixes of the libraries' arguments that read files or download weights. They are rejected: networks
# are trained from scratch here, and a ticket holds all of its weights.
READING = ("checkpoint_path", "cache_dir", "pretrained", "weights")
SAME_VERSIONS = "use the versions of this project and of the model's library that wrote the ticket"
# Models of one's own by name: functions of ``num_classes`` and further arguments (docs/own-parts.md).
OWN_MODELS: dict[str, Callable[..., nn.Module]] = {}
BUILT_AS = "_built_as"  # attribute of a network that :func:`build` built
# What a builder may raise because of its arguments.
MISUSED = (
    TypeError,
    ValueError,
    AssertionError,
    RuntimeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    MemoryError,
)


@dataclass(frozen=True)
class BuiltAs:
    """How :func:`build` builds a network."""

    name: str
    num_classes: int
    args: Mapping[str, Any]


def built_as(model: nn.Module) -> BuiltAs | None:
    """Return what the network was built by; None if :func:`build` did not build it."""
    found = model.__dict__.get(BUILT_AS)
    return found if isinstance(found, BuiltAs) else None


def names() -> list[str]:
    """List every name that :func:`build` knows, except timm's, which are too many to list."""
    return [*CIFAR_MODELS, *_torchvision().list_models(module=_torchvision())]


def build(name: str, *, num_classes: int = 1000, args: dict[str, Any] | None = None, seed: int = 0) -> nn.Module:
    """Build a freshly initialised network; it depends on ``seed`` and not on the state of torch's generator.

    Args:
        name: one of :func:`names`, or ``timm/NAME``.
        num_classes: number of outputs.
        args: further arguments of the network.
        seed: of the initial weights.

    Raises:
        ConfigError: the name is unknown, the network does not take the arguments, or a library is
            not installed.
    """
    builder = _builder(name)
    if "num_classes" in (args or {}):
        raise ConfigError("model.args.num_classes: cannot be set", do="remove it, and set model.num_classes")
    if reading := [key for key in args or {} if key.startswith(READING)]:
        raise ConfigError(f"model.args: {name}: {reading[0]} would load weights from elsewhere", do="remove it")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with _named_where_missing():
                model = builder(num_classes=num_classes, **(args or {}))
        except MISUSED as error:
            raise ConfigError(
                f"model.args: {name}: {error}",
                do="set only arguments that this model takes (model.args={} first clears those of a base)",
            ) from error
    assert isinstance(model, nn.Module)
    setattr(model, BUILT_AS, BuiltAs(name, num_classes, dict(args or {})))
    return model


def outline(
    name: str, *, num_classes: int = 1000, args: dict[str, Any] | None = None, max_tensors: float = math.inf
) -> nn.Module:
    """Build the network on the meta device: names and shapes, without memory or time for its weights.

    Args:
        name: as for :func:`build`.
        num_classes: number of outputs.
        args: further arguments of the network.
        max_tensors: limit on the number of tensors that the builder creates.

    Raises:
        ConfigError: as :func:`build` does, or the network creates more than ``max_tensors`` tensors.
    """
    with _WeightsOnMeta(max_tensors):
        return build(name, num_classes=num_classes, args=args).to("meta")


def build_for(
    shapes: Mapping[str, Sequence[int]], name: str, *, num_classes: int, args: dict[str, Any], whose: str
) -> nn.Module:
    """Build a network from untrusted arguments, if its tensors have the given shapes.

    The outline is checked first, so that harmful arguments cannot allocate a huge network. Arguments and errors are
    those of :func:`outline_for`.
    """
    outline_for(shapes, name, num_classes=num_classes, args=args, whose=whose)
    return build(name, num_classes=num_classes, args=args)


def outline_for(
    shapes: Mapping[str, Sequence[int]], name: str, *, num_classes: int, args: dict[str, Any], whose: str
) -> nn.Module:
    """Build the outline of a network from untrusted arguments, if its tensors have the given shapes.

    Args:
        shapes: the expected shape of every tensor of the state_dict.
        name: as for :func:`build`.
        num_classes: number of outputs.
        args: further arguments of the network, from a file.
        whose: what the shapes come from, to name in an error.

    Raises:
        ConfigError: as :func:`build` does.
        DataError: the network has other tensors.
    """
    num_weights = sum(math.prod(shape) for shape in shapes.values())
    if _largest(args) > max(1000, num_weights):  # with such a depth, even an outline would take too long
        raise ConfigError(
            f"model.args: {name}: {_largest(args)} is out of range for the {num_weights} weights of {whose}"
        )
    outlined = outline(name, num_classes=num_classes, args=args, max_tensors=1000 + 4 * len(shapes))
    require_shapes(outlined, shapes, name, whose=whose)
    return outlined


def require_shapes(
    model: nn.Module, shapes: Mapping[str, Sequence[int]], name: str, *, whose: str, do: str = SAME_VERSIONS
) -> None:
    """Check that the tensors of a network have the given shapes.

    Args:
        model: the network; it may be on the meta device.
        shapes: the expected shape of every tensor of the state_dict.
        name: of the network.
        whose: what the shapes come from, to name in an error.
        do: what to do about the error.

    Raises:
        DataError: the network has other tensors.
    """
    needed = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for key in dict.fromkeys([*shapes, *needed]):
        if key not in shapes or key not in needed or tuple(shapes[key]) != needed[key]:
            there, here = (f"of shape {[*each[key]]}" if key in each else "missing" for each in (needed, shapes))
            raise DataError(
                f"{whose} does not fit {name}: {key} is {there} in the network, but {here} in the file",
                do=do,
            )


def _largest(value: Any) -> float:
    """Find the largest number in arguments."""
    if isinstance(value, dict | list):
        return max(map(_largest, value.values() if isinstance(value, dict) else value), default=0)
    return abs(value) if isinstance(value, int | float) else 0


def image_size(name: str) -> int:
    """Return the height and width, in pixels, of the images that the network was published for.

    Raises:
        ConfigError: the name is unknown, or a library is not installed.
    """
    if name in CIFAR_MODELS:
        return cifar.IMAGE_SIZE
    if name.startswith(TIMM):
        _builder(name)
        published = _timm().get_pretrained_cfg(name.removeprefix(TIMM))
        return 224 if published is None else int(published.input_size[-1])
    return 299 if name == "inception_v3" else 224


class _WeightsOnMeta(TorchFunctionMode):
    """Create weights and buffers on the meta device.

    So are the zero inputs on which some timm networks test a part of themselves. All other tensors
    stay where they are, unlike under ``torch.device("meta")``, because torchvision's RegNet reads
    their values while it is built.
    """

    # the functions with which modules create their parameters and buffers
    FILLED = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
    # and draw initial weights, of which a tensor without memory has none; torch would import its compiler, which takes
    # four seconds
    DRAWN = (torch.Tensor.normal_, torch.Tensor.uniform_)

    def __init__(self, max_tensors: float) -> None:
        super().__init__()
        self.num_left = max_tensors

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.DRAWN and args[0].is_meta:
            return args[0]
        meta = {"device": "meta"} if func in self.FILLED else {}
        self.num_left -= len(meta)
        if self.num_left < 0:
            raise ValueError("the network has many more tensors than expected")
        return func(*args, **{**(kwargs or {}), **meta})


def _builder(name: str) -> Callable[..., Any]:
    """Return the function that builds the network from ``num_classes`` and further arguments."""
    if name in OWN_MODELS:
        return OWN_MODELS[name]
    if ":" in name and not name.startswith(TIMM):
        return _dotted(name)
    if name in CIFAR_MODELS:
        return CIFAR_MODELS[name]
    if name.startswith(TIMM):
        if _timm().is_model(name.removeprefix(TIMM)):
            return lambda **args: _timm().create_model(name.removeprefix(TIMM), pretrained=False, **args)
    elif name in names():
        return lambda **args: _torchvision().get_model(
            name, weights=None, **{**TORCHVISION_DEFAULTS.get(name, {}), **args}
        )
    raise ConfigError(
        f"model.name: {name!r} is not a model of pipeline.models, torchvision or timm", do=f"choose {_close_to(name)}"
    )


def _dotted(name: str) -> Callable[..., Any]:
    """Return the function or class ``module:name`` of a package that a caller has named."""
    module, _, path = name.partition(":")
    package = module.partition(".")[0]
    if not parts.is_named(module):
        raise ConfigError(
            f"model.name: {name!r} is a network of one's own, which a file cannot load",
            do=f"name its package: imports=[{package!r}] or --imports {package}; or pass load_ticket(…, network=…)",
        )
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.name: {name!r}: {error}", do="write it as my_package.module:function") from None
    if not callable(found):
        raise ConfigError(f"model.name: {name!r} is not a function or class", do="name what builds the network")
    return lambda num_classes, **args: found(num_classes=num_classes, **args)


def _close_to(name: str) -> str:
    known = names()
    with contextlib.suppress(ConfigError):  # timm is not installed: the hint leaves it out
        known += [TIMM + timm_name for timm_name in _timm().list_models()]
    return ", ".join(difflib.get_close_matches(name, known, n=3) or CIFAR_MODELS)


def _torchvision() -> Any:
    with _named_where_missing():
        import torchvision.models
    return torchvision.models


def _timm() -> Any:
    with _named_where_missing():
        import timm
    return timm


@contextlib.contextmanager
def _named_where_missing() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        library = (error.name or str(error)).split(".")[0]
        raise ConfigError(
            f"model.name: needs {library}, which is not installed", do=f"python -m pip install {library}"
        ) from error
