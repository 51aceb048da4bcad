"""A network as this package runs it: operations on planes, and what torch still does between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.inference.trace import Operator, Value

Floats = npt.NDArray[np.float32]


@dataclass(eq=False)
class Planes:
    """Channels of height × width numbers. A vector has one row and column; tokens are the columns of one row."""

    channels: int
    height: int = 1
    width: int = 1

    @property
    def is_vector(self) -> bool:
        """Whether each channel is one number: they are then stored one after the other."""
        return self.height == self.width == 1


@dataclass(eq=False)
class Operation:
    """What one step computes."""

    name: str  # of the layer, or what the step does
    source: Planes
    output: Planes

    def inputs(self) -> Iterator[Planes]:
        """The planes that the step reads."""
        yield self.source


@dataclass(eq=False)
class Clamped(Operation):
    """A step that may end by limiting its numbers, as ReLU does."""

    low: float = -math.inf
    high: float = math.inf
    other: Planes | None = None  # is added before

    def inputs(self) -> Iterator[Planes]:
        """The planes that the step reads."""
        yield self.source
        if self.other is not None:
            yield self.other


@dataclass(eq=False)
class Convolution(Clamped):
    """A convolution, or a linear layer as a convolution of 1×1 pixels."""

    weight: str = ""  # name of its weight in the ticket
    scale: Floats = field(default_factory=lambda: np.ones(0, np.float32))  # of each output, for BatchNorm
    bias: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(eq=False)
class Add(Clamped):
    """The sum of two planes."""


@dataclass(eq=False)
class Pointwise(Clamped):
    """Scale and shift of each channel, limits, and then a function of each number."""

    function: str = "same"
    scale: Floats = field(default_factory=lambda: np.ones(0, np.float32))
    shift: Floats = field(default_factory=lambda: np.zeros(0, np.float32))


@dataclass(eq=False)
class Pool(Operation):
    """Maximum or average over windows; ``shares`` is one over the pixels that an average counts."""

    kind: str = "max"
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    shares: Floats | None = None


@dataclass(eq=False)
class Mean(Operation):
    """The average of each plane."""


@dataclass(eq=False)
class Copy(Operation):
    """A copy into channels of the output, from ``first_channel`` on; or into one long vector."""

    first_channel: int = 0
    is_flattened: bool = False


@dataclass(eq=False)
class TorchStep:
    """One operator that torch computes."""

    operator: Operator


@dataclass(eq=False)
class FromTorch:
    """Planes that take what torch has computed: [1, C, H, W], [1, C] or [tokens, C]."""

    value: Value
    output: Planes
    is_tokens: bool


@dataclass(eq=False)
class ToTorch:
    """A torch tensor that shows planes."""

    source: Planes
    value: Value
    is_tokens: bool


Step = Operation | TorchStep | FromTorch | ToTorch


@dataclass
class Graph:
    """All steps in order, where the image comes in, and what comes out."""

    image: Planes
    steps: list[Step]
    output: Value
    planes: dict[Value, tuple[Planes, bool]]  # values that are planes, and whether they are tokens
    constants: dict[Value, Any]  # values that do not depend on the image
