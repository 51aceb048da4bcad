"""Multiply-accumulates per layer, and inference and training FLOPs from the actual masks (algorithm of RigL's appendix H)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Masks = Mapping[str, Tensor]


def layer_macs(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """MACs of one sample of ``input_shape`` (C, H, W) in every convolution and linear layer, keyed by weight name. Nothing is computed."""
    shadow = copy.deepcopy(model).to("meta").eval()
    macs: dict[str, int] = {}

    def count(name: str) -> object:
        def hook(module: nn.Module, _inputs: object, output: Tensor) -> None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            positions = output.numel() // weight.shape[0]  # batch of one: output positions per output channel
            macs[name] = macs.get(name, 0) + weight.numel() * positions

        return hook

    for name, module in shadow.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            module.register_forward_hook(count(f"{name}.weight" if name else "weight"))  # type: ignore[arg-type]
    with torch.no_grad():
        shadow(torch.empty(1, *input_shape, device="meta"))
    return macs


def dense_flops(macs: Mapping[str, int]) -> float:
    """f_D: FLOPs of one forward pass of one sample through the dense network (2 per MAC)."""
    return 2.0 * sum(macs.values())


def sparse_flops(macs: Mapping[str, int], masks: Masks) -> float:
    """f_S: the same with every layer's share weighted by its actual density. Layers without a mask count in full."""
    active = {name: float(torch.count_nonzero(mask)) / mask.numel() for name, mask in masks.items()}
    return 2.0 * sum(count * active.get(name, 1.0) for name, count in macs.items())


def rigl_flops_per_sample(f_sparse: float, f_dense: float, update_interval: int) -> float:
    """RigL's published mean training FLOPs per sample: one step in ΔT + 1 computes the dense gradient instead of updating weights."""
    return (3 * f_sparse * update_interval + 2 * f_sparse + f_dense) / (update_interval + 1)


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
        """Count one step: forward, gradient of activations, and gradient of weights, dense on steps where growth reads it."""
        self.spent += 2 * self.forward + (dense_flops(self.macs) if needs_dense_gradient else self.forward)

    def use(self, masks: Masks) -> None:
        """Count from now on with ``masks``."""
        self.forward = sparse_flops(self.macs, masks)
