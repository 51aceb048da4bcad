"""The graph of operations while it is made from a list of operators."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pipeline.inference.graph import FromTorch, Graph, Operation, Planes, Step, TorchStep, ToTorch
from pipeline.inference.trace import Held, Listing, Operator, Value


class Lowering:
    """A graph under construction, to which rules add one operator after the other.

    Args:
        listing: of the network.
        state: its tensors.
        masks: of its sparse weights.
    """

    def __init__(self, listing: Listing, state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        self.listing, self.state, self.masks = listing, state, masks
        self.uses = Counter(value for each in listing.operators for value in each.inputs())
        self.uses[listing.output] += 1
        _, channels, height, width = listing.image.shape
        self.image = Planes(channels, height, width)
        self.steps: list[Step] = []
        self.planes: dict[Value, tuple[Planes, bool]] = {listing.image: (self.image, False)}
        self.constants: dict[Value, Any] = {}
        self.transposed: dict[Value, Held] = {}  # a weight, transposed
        self.made_by: dict[int, Operation] = {}  # by id of the planes
        self.on_torch: set[Value] = set()

    def leave(self, operator: Operator) -> None:
        """Compute a constant, or leave the operator to torch."""
        given = list(operator.inputs())
        if all(value in self.constants or value in self.transposed for value in given):
            self.fold(operator)
            return
        for value in given:
            if value in self.planes and value not in self.on_torch:
                planes, is_tokens = self.planes[value]
                self.steps.append(ToTorch(planes, value, is_tokens))
                self.on_torch.add(value)
        self.steps.append(TorchStep(operator))
        self.on_torch |= {output for output in operator.outputs if output is not None}

    def fold(self, operator: Operator) -> None:
        """Compute what does not depend on the image."""
        arguments, options = tree_map(self.real, (operator.arguments, operator.options))
        if options.get("device") is not None:
            options["device"] = torch.device("cpu")
        with torch.no_grad():
            results = operator.function(*arguments, **options)
        for value, result in zip(
            operator.outputs, results if isinstance(results, tuple | list) else [results], strict=True
        ):
            if value is not None:
                self.constants[value] = result

    def real(self, item: Any) -> Any:
        """Return the tensor that an argument stands for, if it is constant."""
        if isinstance(item, Held):
            return self.state[item.name]
        if isinstance(item, Value):
            return self.state[self.transposed[item].name].t() if item in self.transposed else self.constants[item]
        return item

    def finish(self) -> Graph:
        """Return the graph."""
        output = self.listing.output
        if output in self.planes and output not in self.on_torch:
            planes, is_tokens = self.planes[output]
            self.steps.append(ToTorch(planes, output, is_tokens))
        return Graph(self.image, self.steps, output, self.planes, self.constants)

    # -- planes

    def planes_of(self, item: Any, *, as_tokens: bool = False) -> Planes | None:
        """Return the planes of a value, which are filled from torch if it computed the value; None: it has none."""
        if not isinstance(item, Value):
            return None
        if item in self.planes:
            planes, is_tokens = self.planes[item]
            return planes if is_tokens == as_tokens or planes.is_vector else None
        if item not in self.on_torch:
            return None
        if as_tokens and len(item.shape) >= 2 and math.prod(item.shape[:-1]) > 1:
            planes = Planes(item.shape[-1], 1, math.prod(item.shape[:-1]))
        elif not as_tokens and len(item.shape) == 4 and item.shape[0] == 1:
            planes = Planes(*item.shape[1:])
        elif len(item.shape) == 2 and item.shape[0] == 1:
            planes = Planes(item.shape[1])
        else:
            return None
        self.steps.append(FromTorch(item, planes, as_tokens))
        self.planes[item] = (planes, as_tokens)
        return planes

    def add(self, operation: Operation, value: Value | None, *, is_tokens: bool = False) -> bool:
        """Add an operation that computes ``value``."""
        assert value is not None
        self.steps.append(operation)
        self.made_by[id(operation.output)] = operation
        self.planes[value] = (operation.output, is_tokens)
        return True

    def same(self, value: Value | None, planes: Planes, *, is_tokens: bool = False) -> bool:
        """Let ``value`` be another name of the planes, which then have further uses."""
        assert value is not None
        self.planes[value] = (planes, is_tokens)
        return True

    def only_use(self, value: Any) -> Operation | None:
        """Return the operation that makes the planes of ``value`` if nothing else reads them."""
        if not isinstance(value, Value) or value not in self.planes or value in self.on_torch:
            return None
        planes, _ = self.planes[value]
        names = [other for other, (each, _) in self.planes.items() if each is planes]
        read = sum(self.uses[name] for name in names) - sum(1 for name in names if name is not value)
        return self.made_by.get(id(planes)) if read == 1 else None

    def numbers(self, item: Any) -> Any:
        """Return a held or constant tensor as float32."""
        return np.asarray(self.real(item).detach().to(torch.float32).numpy())
