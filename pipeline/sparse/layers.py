"""Which weights of a model are sparse, and how each is used."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pipeline.errors import ConfigError

NormShapes = Mapping[str, tuple[int, ...]]  # of the weights under weight_norm, by name: ``Form.norm_shape``
NO_NORMS: NormShapes = MappingProxyType({})
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ONE_WEIGHT = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Bilinear, *TRANSPOSED)
# The first, or where widths differ the other three; the output projection is a linear layer in the module.
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Form:
    """How a sparse weight is used, where its own shape does not say."""

    shape: tuple[int, ...]  # (outputs, inputs, *kernel) of one matrix or kernel, whose fan-in and fan-out count
    copies: int = 1  # such matrices in the weight: its experts
    is_mixed: bool = False  # experts are added up to one kernel, for each image, before it is used (CondConv)
    # of the norms that weight_norm divides by, such as (outputs, 1, 1, 1); None: it is not normalised
    norm_shape: tuple[int, ...] | None = None
    unstructured: str = ""  # why groups of its inputs cannot be formed; empty if they can


@dataclass(frozen=True)
class Owned:
    """A weight that a module itself, not a module in it, multiplies activations with."""

    attribute: str  # under which the module uses it
    name: str  # of the parameter in the module; differs from ``attribute`` where it is parametrised
    parameter: nn.Parameter
    norms: nn.Parameter | None = None  # what weight_norm scales to


def owned_weights(module: nn.Module) -> Iterator[Owned]:
    """The weights that ``module`` itself multiplies activations with, found by module type.

    They are a convolution's (transposed ones too), a linear or bilinear layer's, the matrices of
    recurrent layers, the input projections of attention, and stacked experts. Experts are the
    parameters of a module with an integer attribute ``num_experts``: those of at least three
    dimensions whose first is that number, and its ``weight`` [num_experts, n] where the attribute
    ``weight_shape`` is the shape of n values (timm's CondConv).

    Of a weight under ``weight_norm`` or ``spectral_norm``, as hooks or as parametrizations, it is
    the parameter that the optimiser holds: ``weight_v`` and ``weight_orig``, or
    ``parametrizations.weight.original1`` and ``….original``. Both norms only scale, so the
    weight in use is 0 exactly where that parameter is. Other parametrizations are not found.
    """
    for attribute in _attributes(module):
        if (found := _owned(module, attribute)) is not None:
            yield found


def _attributes(module: nn.Module) -> Iterator[str]:
    if isinstance(module, _ONE_WEIGHT):
        yield "weight"
    elif isinstance(module, nn.MultiheadAttention):
        yield from _ATTENTION
    elif isinstance(module, nn.RNNBase):
        kinds = ("ih", "hh", "hr") if module.proj_size else ("ih", "hh")
        for layer in range(module.num_layers):
            for direction in ("", "_reverse") if module.bidirectional else ("",):
                yield from (f"weight_{kind}_l{layer}{direction}" for kind in kinds)
    elif isinstance(module, nn.RNNCellBase):
        yield from ("weight_ih", "weight_hh")
    else:
        yield from (name for name, own in module._parameters.items() if own is not None and _expert_shape(module, name))


def _expert_shape(module: nn.Module, attribute: str) -> tuple[int, ...]:
    """The shape of one expert in a parameter; () if it holds no experts."""
    parameter, num_experts = module._parameters[attribute], getattr(module, "num_experts", None)
    if type(num_experts) is not int or parameter is None or isinstance(parameter, nn.UninitializedParameter):
        return ()
    shape, flat = tuple(parameter.shape), getattr(module, "weight_shape", None)
    if (
        len(shape) == 2
        and attribute == "weight"
        and isinstance(flat, tuple)
        and shape == (num_experts, math.prod(flat))
    ):
        return tuple(flat)
    return shape[1:] if len(shape) >= 3 and shape[0] == num_experts and is_matrix(shape[1:]) else ()


def is_matrix(shape: Sequence[int]) -> bool:
    """Has it at least two dimensions that are longer than 1? Biases, scales and the parameters of norms have not."""
    return sum(size > 1 for size in shape) >= 2


def _owned(module: nn.Module, attribute: str) -> Owned | None:
    if (parametrized := parametrizations_of(module).get(attribute)) is not None:
        if not all(isinstance(each, (_WeightNorm, _SpectralNorm)) for each in parametrized):
            return None
        name = "original" if parametrized.is_tensor else "original1"
        held = dict(parametrized.named_parameters(recurse=False))
        path = f"parametrizations.{attribute}.{name}"
        return Owned(attribute, path, held[name], held.get("original0")) if name in held else None
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == attribute:
            return Owned(attribute, f"{attribute}_v", *(getattr(module, f"{attribute}_{of}") for of in "vg"))
        if isinstance(hook, SpectralNorm) and hook.name == attribute:
            return Owned(attribute, f"{attribute}_orig", getattr(module, f"{attribute}_orig"))
    parameter = module._parameters.get(attribute)
    return None if parameter is None else Owned(attribute, attribute, parameter)


def parametrizations_of(module: nn.Module) -> dict[str, ParametrizationList]:
    """What ``torch.nn.utils.parametrize`` has registered, by the attribute that it computes."""
    found = getattr(module, "parametrizations", None)
    lists = found.items() if isinstance(found, nn.ModuleDict) else ()
    return {name: each for name, each in lists if isinstance(each, ParametrizationList)}


def sparse_weights(model: nn.Module, dense_layers: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Return the weights of all layers that can be sparse (:func:`owned_weights`), in ``named_parameters`` order.

    A shared weight is listed once. Names are those of the network itself, without the prefix of
    ``torch.compile``. ``dense_layers`` are name patterns (``fc.weight``, ``layer1.*``) of weights that
    stay dense.

    Raises:
        ConfigError: for a pattern that matches none of them.
    """
    owned = {id(weight.parameter) for module in model.modules() for weight in owned_weights(module)}
    found = {_uncompiled(name): parameter for name, parameter in model.named_parameters() if id(parameter) in owned}
    for pattern in dense_layers:
        if not fnmatch.filter(found, pattern):
            names = list(found) if len(found) <= 6 else [*list(found)[:3], "…", *list(found)[-2:]]
            what = f"dense_layers: none of the {len(found)} weights that can be sparse matches {pattern!r}"
            raise ConfigError(what, do=f"choose among {', '.join(names)}")
    return {name: p for name, p in found.items() if not any(fnmatch.fnmatch(name, pattern) for pattern in dense_layers)}


def forms_of(model: nn.Module) -> dict[str, Form]:
    """How each of :func:`sparse_weights` is used; the first use of a shared one."""
    forms: dict[int, Form] = {}
    for module in model.modules():
        for weight in owned_weights(module):
            forms.setdefault(id(weight.parameter), _form(module, weight))
    return {name: forms[id(weight)] for name, weight in sparse_weights(model).items()}


def norm_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of the norms of each sparse weight that is under weight_norm."""
    return {name: form.norm_shape for name, form in forms_of(model).items() if form.norm_shape is not None}


def _form(module: nn.Module, weight: Owned) -> Form:
    shape = tuple(weight.parameter.shape)
    norm_shape = None if weight.norms is None else tuple(weight.norms.shape) or (1,) * len(shape)
    normed = "" if norm_shape is None else "its outputs are normalised by weight_norm, which needs a weight in each"
    if isinstance(module, TRANSPOSED):  # stored as (inputs, outputs / groups, *kernel)
        groups = module.groups
        used = (shape[1] * groups, shape[0] // groups, *shape[2:])
        return Form(used, norm_shape=norm_shape, unstructured=normed or "a transposed convolution stores inputs first")
    if isinstance(module, nn.Bilinear):  # every output has a weight for each pair of inputs
        return Form((shape[0], shape[1] * shape[2]), norm_shape=norm_shape, unstructured=normed)
    if weight.attribute in module._parameters and (expert := _expert_shape(module, weight.attribute)):
        return Form(expert, shape[0], is_mixed=len(shape) == 2, unstructured="its first dimension is the experts")
    return Form(shape, norm_shape=norm_shape, unstructured=normed)


def plain_name(name: str) -> str:
    """A parameter's name without what ``torch.compile`` and wrappers put before it."""
    return _uncompiled(name).removeprefix("module.")


def _uncompiled(name: str) -> str:
    return name.replace("_orig_mod.", "")
