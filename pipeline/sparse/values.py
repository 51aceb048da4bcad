"""The tensors that hold values of a model's sparse weights: the weights, their optimiser state, and their copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.distributed import session
from pipeline.sparse.checks import check_model
from pipeline.sparse.dense import dense_part
from pipeline.sparse.layers import forms_of, plain_name, sparse_weights
from pipeline.sparse.optimizers import states_of
from pipeline.sparse.select import are_nonzero_outside, count_true, multiply_by_masks

Fragments = Callable[[nn.Parameter], Sequence[tuple[Tensor, int]]]


class WeightValues:
    """The sparse weights of a model by name, with every other tensor that holds their values or optimiser state.

    All these tensors are kept at 0 outside the masks in use.

    Args:
        model: the model; only its sparse weights that require a gradient are included.
        optimizer: any optimiser whose state tensors have the shape of their parameter.
        dense_layers: names or patterns of weights that stay dense.
        fragments: returns the tensors outside the model that hold parts of a parameter; see
            :class:`pipeline.sparse.Sparsifier`.
        shadows: models with the same parameter names whose weights follow this model's.

    Raises:
        ConfigError: the model, the optimiser and the shadows do not match.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        dense_layers: Sequence[str] = (),
        fragments: Fragments | None = None,
        shadows: Sequence[nn.Module] = (),
    ) -> None:
        self.weights = {
            name: weight for name, weight in sparse_weights(model, dense_layers).items() if weight.requires_grad
        }
        self.shadows = [parameters_of(shadow) for shadow in shadows]
        self._parameters = dict(model.named_parameters())
        self._optimizer = optimizer
        self._fragments: Fragments = fragments or (lambda parameter: ())
        check_model(self.weights, self.shadows, optimizer if fragments is None else None)
        forms = forms_of(model)
        self.forms = {name: forms[name] for name in self.weights}
        self.output_layer = list(forms)[-1]  # the last layer of the model, sparse or dense
        self.dense = dense_part(model, self.weights, dense_layers)
        self.norm_shapes = {n: form.norm_shape for n, form in self.forms.items() if form.norm_shape is not None}
        self.masks: dict[str, Tensor] = {}
        self.partly_active: dict[str, nn.Parameter] = {}  # the weights with at least one inactive value

    def use(self, masks: Mapping[str, Tensor]) -> int:
        """Use ``masks`` from now on, and return the number of active weights. No value is changed.

        The masks (bool, in the weights' shapes) are copied to the memory format of the weights, in
        which applying them is fastest.
        """
        self.masks = {
            name: torch.empty_like(w, dtype=torch.bool).copy_(masks[name]) for name, w in self.weights.items()
        }
        counts = count_true(list(self.masks.values()))
        self.partly_active = {
            name: w for (name, w), count in zip(self.weights.items(), counts, strict=True) if count < w.numel()
        }
        return sum(counts)

    def zero_inactive(self) -> None:
        """Set the weights, their optimiser state and their copies to 0 outside the masks."""
        multiply_by_masks(self._held(self._partial_masks()))

    def follow_step(self) -> None:
        """The same without the shadows, which follow the weights themselves."""
        multiply_by_masks(self._held(self._partial_masks(), with_shadows=False))

    def zero_where(self, marks: Mapping[str, Tensor]) -> None:
        """Set the weights, their optimiser state and their copies to 0 where ``marks`` is True.

        Args:
            marks: bool, in the weights' shapes, by name.
        """
        kept = {name: torch.empty_like(self.masks[name]).copy_(~mark) for name, mark in marks.items()}
        multiply_by_masks(self._held(kept))

    def zero_inactive_gradients(self) -> None:
        """Set the gradients to 0 outside the masks.

        The last layer comes first: the optimiser begins with the first layer, whose gradient is then
        still in the cache.
        """
        layers = reversed(self.partly_active.items())
        multiply_by_masks((weight.grad, self.masks[name]) for name, weight in layers if weight.grad is not None)

    def find_nonzero_inactive(self) -> str | None:
        """Return the name of the first weight that is not 0 outside its mask, or None; one host read in all."""
        return self._first_outside({name: weight.detach() for name, weight in self.partly_active.items()})

    def find_nonzero_in_shadow(self, shadow: nn.Module) -> str | None:
        """Return the name of the first weight of ``shadow`` that is not 0 outside its mask, or None.

        Reads one value back to the host. Raises ConfigError if ``shadow`` does not have the model's
        parameters.
        """
        held = parameters_of(shadow)
        check_model(self.weights, [held], None)
        return self._first_outside({name: held[plain_name(name)].detach() for name in self.partly_active})

    def find_nonfinite(self) -> list[str] | None:
        """Check that all gradients (also of dense weights) and all sparse weights are finite on every rank.

        Returns:
            None if they are; otherwise the names of the tensors that are not finite on this rank. The
            list is empty if they are on other ranks only.
        """
        tensors = {f"gradient of {name}": p.grad for name, p in self._parameters.items() if p.grad is not None}
        tensors |= {name: weight.detach() for name, weight in self.weights.items()}
        is_good = torch.isfinite(torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors.values()))]))
        if session.agree(is_finite=is_good.all())[0]:
            return None
        is_good = torch.stack(
            [torch.isfinite(tensor).all() for tensor in tensors.values()]
        )  # a norm overflows sooner than its values
        if session.agree(is_finite=is_good.all())[0]:
            return None
        return [name for name, good in zip(tensors, is_good.tolist(), strict=True) if not good]

    def _partial_masks(self) -> dict[str, Tensor]:
        return {name: self.masks[name] for name in self.partly_active}

    def _held(self, masks: Mapping[str, Tensor], *, with_shadows: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each tensor that holds values of a weight or of its optimiser state, with its mask (same shape)."""
        for name, mask in masks.items():
            weight = self.weights[name]
            shadows = [shadow[plain_name(name)] for shadow in self.shadows] if with_shadows else []
            for tensor in (weight, *states_of(self._optimizer, weight), *shadows):
                yield tensor.detach(), mask
            for fragment, start in self._fragments(weight):
                yield fragment, mask.reshape(-1)[start : start + fragment.numel()]

    def _first_outside(self, tensors: Mapping[str, Tensor]) -> str | None:
        are_nonzero = are_nonzero_outside((tensor, self.masks[name]) for name, tensor in tensors.items())
        return next((name for name, is_nonzero in zip(tensors, are_nonzero, strict=True) if is_nonzero), None)


def parameters_of(shadow: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of ``shadow`` by name, without the prefix that a wrapper such as DDP adds."""
    return {plain_name(name): parameter for name, parameter in shadow.named_parameters()}
