"""Count multiply-accumulates per layer, and inference and training FLOPs from the actual masks (RigL, appendix H)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.sparse.exploration import density_of_layers
from pipeline.sparse.layers import (
    forms_of,
    is_matrix,
    owned_weights,
    parametrizations_of,
    plain_name,
    sparse_weights,
)
from pipeline.sparse.masks import Masks

MIXED = " mixed"  # ends the name under which the products of a mixed kernel are counted
NOTHING = ""  # is entered while a weight is computed


def layer_macs(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Count the MACs of one sample for each weight that activations are multiplied with, sparse or not.

    ``input_shape`` is (C, H, W); the result is keyed by parameter name. Nothing is computed: an
    outline of the model runs on the meta device, and every product with such a weight counts, whether
    its module is called or a function uses the weight. As in RigL, products of two activations
    (attention's Q·Kᵀ and its sum over V), normalisation (of weights too), activations and biases do
    not count. Where experts are mixed to one kernel, its products are counted under the weight's
    name followed by ``MIXED``: the kernel has the union of their masks.

    Raises:
        RuntimeError, ValueError, AssertionError: as the model does for an input that it cannot take.
    """
    shadow = _outline(model)
    matrices = {name: weight for name, weight in shadow.named_parameters() if is_matrix(weight.shape)}
    names = {_storage(weight): plain_name(name) for name, weight in matrices.items()}
    forms, sparse = forms_of(shadow), sparse_weights(shadow)
    counter = _ProductCounter(names | {_storage(weight): name for name, weight in sparse.items()})
    with counter:
        for prefix, module in shadow.named_modules():
            counter.follow_computed_weights(module, f"{prefix}." if prefix else "")
            # a layer with one weight may use a function of it, such as its standardisation
            if owned := [weight for weight in owned_weights(module) if weight.attribute == "weight"]:
                name = counter.by_storage[_storage(owned[0].parameter)]
                module.register_forward_pre_hook(counter.enter(name + MIXED if forms[name].is_mixed else name))
                module.register_forward_hook(counter.leave)
        shadow(torch.empty(1, *input_shape, device="meta"))
    return counter.macs


class _ProductCounter(TorchDispatchMode):
    """Adds up the MACs of every product with a known weight, or a view or part of it, or inside an entered layer."""

    MATRIX_PRODUCTS = ("mm", "mv", "addmm", "addmv", "bmm", "baddbmm")  # what ``linear`` and ``matmul`` come down to

    def __init__(self, by_storage: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_storage = dict(by_storage)
        self.computed: list[Tensor] = []  # weights made from parameters, kept so that nothing else takes their storage
        self.entered: list[
            str
        ] = []  # for layers that compute with a function of their weight, such as its standardisation
        self.macs: dict[str, int] = {}

    def follow_computed_weights(self, module: nn.Module, prefix: str) -> None:
        """Count nothing while a weight of ``module`` is computed, and the products with it under its parameter's name.

        It is computed by ``torch.nn.utils.parametrize``, or by hooks that leave a plain tensor in
        the module (weight_norm and spectral_norm of old, pruning).
        """
        names = {weight.attribute: self.by_storage[_storage(weight.parameter)] for weight in owned_weights(module)}

        def note(attribute: str, weight: Tensor) -> None:
            if _storage(weight) not in self.by_storage:
                self.computed.append(weight)
                self.by_storage[_storage(weight)] = names.get(attribute, plain_name(prefix + attribute))

        def after_hooks(*_: object) -> None:
            self.leave()
            for attribute, value in list(vars(module).items()):
                if isinstance(value, Tensor):
                    note(attribute, value)

        def after_parametrization(attribute: str) -> Callable[..., None]:
            def after(_: nn.Module, __: object, weight: Tensor) -> None:
                self.leave()
                note(attribute, weight)

            return after

        for attribute, each in parametrizations_of(module).items():
            each.register_forward_pre_hook(self.enter(NOTHING))
            each.register_forward_hook(after_parametrization(attribute))
        if module._forward_pre_hooks:
            module.register_forward_pre_hook(self.enter(NOTHING), prepend=True)
            module.register_forward_pre_hook(after_hooks)

    def enter(self, name: str) -> Callable[..., None]:
        return lambda *_: self.entered.append(name)

    def leave(self, *_: object) -> None:
        self.entered.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        product = func.overloadpacket.__name__
        if product == "convolution":
            (image, weight), is_transposed = args[:2], args[6]
            # Every weight is used at each position of the output, stored as (out, in/groups, …); a transposed
            # one's, stored as (in, out/groups, …), at each position of the input.
            positions = (image if is_transposed else output).numel() // weight.shape[0]
            self._add((image, weight), weight.numel() * positions)
        elif product == "_trilinear":  # a bilinear layer; the sum over its second input is one over activations
            self._add(args[1:2], args[1].numel() * output.numel() // args[1].shape[0])
        elif product in self.MATRIX_PRODUCTS:
            first, second = args[-2:]
            self._add((first, second), output.numel() * first.shape[-1])
        return output

    def _add(self, factors: Sequence[Tensor], macs: int) -> None:
        known = [self.by_storage[_storage(factor)] for factor in factors if _storage(factor) in self.by_storage]
        for name in (known or self.entered)[-1:] if NOTHING not in self.entered else ():
            self.macs[name] = self.macs.get(name, 0) + macs


def _outline(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in evaluation mode on the meta device, made without copying its tensors."""
    plain = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    copies: dict[int, object] = {
        id(tensor): torch.empty_like(tensor, device="meta") for tensor in (*model.buffers(), *plain)
    }
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    return copy.deepcopy(model, copies).eval()


def _storage(tensor: Tensor) -> int:
    """Equal for a tensor and its views."""
    return int(tensor.untyped_storage()._cdata)


def dense_flops(macs: Mapping[str, int]) -> float:
    """f_D: FLOPs of one forward pass of one sample through the dense network (2 per MAC)."""
    return 2.0 * sum(macs.values())


def sparse_flops(macs: Mapping[str, int], masks: Masks) -> float:
    """f_S: the same with every layer's share weighted by its actual density. Layers without a mask count in full."""
    mixed = {name: mask.any(0) for name, mask in masks.items() if name + MIXED in macs}
    densities = density_of_layers({**masks, **{name + MIXED: union for name, union in mixed.items()}})
    return flops_at(macs, densities)


def mixed_density(density: float, num_experts: int) -> float:
    """The expected density of a kernel that is mixed from experts with random masks of ``density``: their union's."""
    return float(1 - (1 - density) ** num_experts)


def flops_at(macs: Mapping[str, int], densities: Mapping[str, float]) -> float:
    """f_S from densities."""
    return 2.0 * sum(count * densities.get(name, 1.0) for name, count in macs.items())


def rigl_flops_per_sample(f_sparse: float, f_dense: float, update_interval: int) -> float:
    """Return the mean training FLOPs per sample published for RigL.

    One step in ΔT + 1 computes the dense gradient instead of updating weights.
    """
    return (3 * f_sparse * update_interval + 2 * f_sparse + f_dense) / (update_interval + 1)


def snfs_flops_per_sample(f_sparse: float, f_dense: float) -> float:
    """SNFS: every step computes the dense gradient, for its moving average."""
    return 2 * f_sparse + f_dense


@dataclass
class FlopMeter:
    """Training FLOPs per sample, summed over steps, from the masks that were active in each."""

    macs: Mapping[str, int]
    forward: float  # f_S of the masks in use
    spent: float = 0.0  # Σ over steps of the FLOPs for one sample

    @classmethod
    def of(cls, macs: Mapping[str, int], masks: Masks) -> FlopMeter:
        """A meter that starts with ``masks``."""
        return cls(macs, sparse_flops(macs, masks))

    def step(self, *, needs_dense_gradient: bool) -> None:
        """Count one step: forward, gradient of activations, and gradient of weights (dense if growth reads it)."""
        self.spent += 2 * self.forward + (dense_flops(self.macs) if needs_dense_gradient else self.forward)

    def use(self, masks: Masks) -> None:
        """Count from now on with ``masks``."""
        self.forward = sparse_flops(self.macs, masks)
