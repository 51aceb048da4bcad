"""SGD in one pass over the weights; on a CPU with the same bits as torch's plain step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from pipeline.engine import masked_sgd
from pipeline.sparse.select import multiply_by_masks

VECTOR = 16  # elements; a multiple of the vector length of torch's fused step on every CPU


class OnePassSGD(torch.optim.SGD):
    """``torch.optim.SGD``, fused except for the last elements of each tensor.

    On a CPU, torch's fused step does the same arithmetic as its plain one, in one pass instead of
    four. But it rounds differently the last elements, which do not fill a vector, so that weights
    would depend on how ZeRO cuts them up. These few elements take the plain step here. On a GPU
    every element is computed alike, and whole tensors take the fused step.

    A parameter may get its first gradient in any step: its momentum then starts at 0. (Torch's fused
    step raises TypeError if only some parameters of a group have momentum yet.)

    On a CPU with one thread it can also mask the gradients, on the way and with the same bits
    (:meth:`use_masks`): another pass over the gradients would take half as long as the step.
    """

    keeps_zeros = True  # see pipeline.sparse.optimizers
    found_inf: Tensor | None = None  # as in torch's fused optimisers: a step changes nothing where it is 1
    _masks: Mapping[nn.Parameter, Tensor] = MappingProxyType({})

    def use_masks(self, masks: Mapping[nn.Parameter, Tensor]) -> None:
        """Let steps take gradients as 0 outside ``masks`` (bool, of the weights' shapes), if :attr:`is_masking`."""
        own = {parameter for group in self.param_groups for parameter in group["params"]}
        can_mask = all(parameter in own and parameter.is_cpu for parameter in masks)
        self._masks = masks if can_mask else {}

    @property
    def is_masking(self) -> bool:
        """Whether steps take the gradients of all sparse weights as 0 outside the masks."""
        return bool(self._masks) and masked_sgd.is_available()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """See ``torch.optim.SGD.step``."""
        assert closure is None, "closures are not supported"
        masks = self._masks if self.is_masking else {}
        if masks and self.found_inf is not None and self.found_inf:
            return
        for group in self.param_groups:
            fused: list[list[Tensor]] = []  # a part of a weight, of its gradient and, with momentum, of its buffer
            plain: list[list[Tensor]] = []
            masked: list[list[Tensor]] = []  # the mask before them
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                tensors = [parameter, parameter.grad]
                if group["momentum"]:
                    state = self.state[parameter]
                    if state.get("momentum_buffer") is None:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    tensors.append(state["momentum_buffer"])
                is_alike = _have_same_layout(tensors)
                if (mask := masks.get(parameter)) is not None:
                    if is_alike and mask.stride() == parameter.stride() and parameter.dtype == torch.float32:
                        masked.append([mask, *tensors])
                        continue
                    multiply_by_masks([(parameter.grad, mask)])
                if not is_alike:
                    plain.append(tensors)
                    continue
                if not (rest := parameter.numel() % VECTOR if parameter.is_cpu else 0):
                    fused.append(tensors)
                    continue
                flat = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]
                fused.append([tensor[:-rest] for tensor in flat])
                plain.append([tensor[-rest:] for tensor in flat])
            if masked:
                _masked_step(group, masked)
            _step(group, [part for part in fused if part[0].numel()], found_inf=self.found_inf)
            plain = [part for part in plain if part[0].numel()]
            # on a GPU there are plain parts only where a layout is neither contiguous nor channels-last
            if plain and (self.found_inf is None or not self.found_inf):
                _step(group, plain)


def _have_same_layout(tensors: list[Tensor]) -> bool:
    """Return whether each tensor fills one block of memory, all in the same order."""
    first = tensors[0]
    is_dense = first.is_contiguous() or (first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last))
    strides, dtype = first.stride(), first.dtype
    return is_dense and all(tensor.stride() == strides and tensor.dtype == dtype for tensor in tensors[1:])


def _masked_step(group: dict[str, Any], parts: list[list[Tensor]]) -> None:
    assert not group["dampening"] and not group["maximize"], "neither dampening nor maximize is supported with masks"
    options = {key: group[key] for key in ("lr", "momentum", "weight_decay", "nesterov")}
    masked_sgd.step(parts, **options)


def _step(group: dict[str, Any], parts: list[list[Tensor]], **fused: Any) -> None:
    if not parts:
        return
    parameters, gradients, *buffers = (list(column) for column in zip(*parts, strict=True))
    keys = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
    options = {key: group[key] for key in keys} | fused
    empty: list[Tensor | None] = [None] * len(parts)
    sgd(parameters, gradients, [*buffers[0]] if buffers else empty, fused=bool(fused), foreach=False, **options)
