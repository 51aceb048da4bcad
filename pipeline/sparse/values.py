"""What holds the values of a model's sparse weights: the weights, their optimiser state, and copies of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.distributed import session
from pipeline.sparse.checks import check_model
from pipeline.sparse.layers import forms_of, plain_name, sparse_weights
from pipeline.sparse.select import are_nonzero_outside, count_true, multiply_by_masks

Fragments = Callable[[nn.Parameter], Sequence[tuple[Tensor, int]]]


class WeightValues:
    """The sparse weights of ``model`` by name, and everything else that holds their values or their optimiser state.

    All of it is kept 0 where the masks in use are not active.

    Args:
        model: its weights that require a gradient are held.
        optimizer: any whose per-parameter state has tensors of the parameter's shape.
        dense_layers: name patterns of weights to leave alone.
        fragments: of a parameter, the tensors elsewhere that hold a part of it; see ``Sparsifier``.
        shadows: models with the same parameter names that follow this one.

    Raises:
        ConfigError: when these do not go together.
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
        self.norm_shapes = {n: form.norm_shape for n, form in self.forms.items() if form.norm_shape is not None}
        self.masks: dict[str, Tensor] = {}
        self.partly_active: dict[str, nn.Parameter] = {}  # the weights of which something is inactive

    def use(self, masks: Mapping[str, Tensor]) -> int:
        """Take ``masks`` into use, in the memory format of the weights, where applying them is fastest.

        Changes no value. Returns the number of active weights.
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
        """Set everything that is held to 0 where the masks are not active."""
        multiply_by_masks(self._held())

    def zero_inactive_gradients(self) -> None:
        """The same for the gradients.

        Last layer first: the optimiser begins with the first one, whose gradient is then still in
        the cache.
        """
        layers = reversed(self.partly_active.items())
        multiply_by_masks((weight.grad, self.masks[name]) for name, weight in layers if weight.grad is not None)

    def find_nonzero_inactive(self) -> str | None:
        """The first weight that is not 0 where its mask is; one host read for all."""
        return self._first_outside({name: weight.detach() for name, weight in self.partly_active.items()})

    def find_nonzero_in_shadow(self, shadow: nn.Module) -> str | None:
        """The first weight that is not 0 in ``shadow`` where its mask is; one host read for all."""
        held = parameters_of(shadow)
        check_model(self.weights, [held], None)
        return self._first_outside({name: held[plain_name(name)].detach() for name in self.partly_active})

    def find_nonfinite(self) -> list[str] | None:
        """None when all gradients, of weights that are not sparse too, and the sparse weights are finite on all ranks.

        Otherwise the names of those that are not on this rank, which may be none.
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

    def _held(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(what holds values of a weight or its optimiser state, the mask of that)."""
        for name, weight in self.partly_active.items():
            mask = self.masks[name]
            states = self._optimizer.state.get(weight, {}).values()
            shadows = [shadow[plain_name(name)] for shadow in self.shadows]
            for tensor in (weight, *(s for s in states if isinstance(s, Tensor) and s.shape == weight.shape), *shadows):
                yield tensor.detach(), mask
            for fragment, start in self._fragments(weight):
                yield fragment, mask.reshape(-1)[start : start + fragment.numel()]

    def _first_outside(self, tensors: Mapping[str, Tensor]) -> str | None:
        are_nonzero = are_nonzero_outside((tensor, self.masks[name]) for name, tensor in tensors.items())
        return next((name for name, is_nonzero in zip(tensors, are_nonzero, strict=True) if is_nonzero), None)


def parameters_of(shadow: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by the names that they have in the network itself, without a wrapper's prefix."""
    return {plain_name(name): parameter for name, parameter in shadow.named_parameters()}
