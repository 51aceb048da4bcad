"""Part ``structures``: a training step of a ViT whose masks have a structure that torch has kernels for.

The products of the MLPs run once with dense kernels on masked weights, as everywhere in this project,
and once with torch's semi-structured (2:4) and block-sparse (BSR) kernels. The weights stay where they
are; each step takes the active values out of them.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.gpu import loop
from benchmarks.gpu.loop import Trainer, interleaved, on_device, ratio
from benchmarks.gpu.report import NotRunError, Options, Report
from pipeline import models
from pipeline.sparse.strategy import METHODS, Strategy

BLOCK = 32
LARGEST = 2e-2  # difference of an output, of the largest one, in bf16

Product = Callable[[Tensor, Tensor], Tensor]  # (weight [out, in], columns [in, n]) -> [out, n]


def strategy_of(structure: str) -> Strategy:
    return dataclasses.replace(METHODS["set"], structure=structure, prune="magnitude", distribution="uniform")


STRUCTURES = {"2:4": (strategy_of("2:4"), 0.5), "block": (strategy_of(f"block {BLOCK}x{BLOCK}"), 0.1)}


def two_of_four(mask: Tensor) -> tuple[Product, Product]:
    """Return the products with a weight that is 2:4 along its inputs, and with its transpose, which is not."""
    from torch.sparse import to_sparse_semi_structured

    def forward(weight: Tensor, columns: Tensor) -> Tensor:
        # the kernel wants the sparse matrix first, and a number of columns that is a multiple of 8
        product: Tensor = torch.mm(to_sparse_semi_structured(weight), columns.contiguous())
        return product

    return forward, lambda weight, columns: weight.t() @ columns


def blocks(mask: Tensor) -> tuple[Product, Product]:
    """Return the products with a weight of whole blocks, and with its transpose. Their places are read once."""

    def product(mask: Tensor, is_transposed: bool) -> Product:
        rows, columns = (size // BLOCK for size in mask.shape)
        is_active = mask.view(rows, BLOCK, columns, BLOCK).any(dim=3).any(dim=1)
        row, column = is_active.nonzero(as_tuple=True)
        starts = torch.cat([row.new_zeros(1), is_active.sum(dim=1).cumsum(0)])

        def of(weight: Tensor, right: Tensor) -> Tensor:
            weight = weight.t() if is_transposed else weight
            values = weight.reshape(rows, BLOCK, columns, BLOCK).permute(0, 2, 1, 3)[row, column]
            sparse = torch.sparse_bsr_tensor(starts, column, values, size=weight.shape, check_invariants=False)
            result: Tensor = sparse @ right.contiguous()
            return result

        return of

    return product(mask, False), product(mask.t().contiguous(), True)


class SparseProduct(torch.autograd.Function):
    """``inputs @ weight.T`` by sparse products; the gradient of the weight is a dense product, masked later."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, forward: Product, backward: Product) -> Tensor:
        """Multiply [n, in] by the transpose of [out, in]."""
        ctx.save_for_backward(inputs, weight)
        ctx.backward_product = backward
        return forward(weight, inputs.t()).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of inputs and weight."""
        inputs, weight = ctx.saved_tensors
        (gradient,) = gradients
        of_inputs = ctx.backward_product(weight, gradient.t()).t()
        return of_inputs, gradient.t() @ inputs, None, None


def sparse_linear(layer: nn.Linear, products: tuple[Product, Product], dtype: torch.dtype, inputs: Tensor) -> Tensor:
    """Compute a linear layer by sparse products in ``dtype``."""
    flat = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
    found: Tensor = SparseProduct.apply(flat, layer.weight.to(dtype), *products)  # type: ignore[no-untyped-call]
    if layer.bias is not None:
        found = found + layer.bias.to(dtype)
    return found.view(*inputs.shape[:-1], -1)


def network(given: Options) -> nn.Module:
    """Build ViT-B/16, or a small one."""
    if given.device == "cuda" and not given.is_quick:
        return models.build("vit_b_16")
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    small: nn.Module = VisionTransformer(
        32, 16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=1000
    )
    return small


def structures(given: Options, report: Report) -> None:
    """Compare the steps; whatever comes out is reported."""
    warnings.filterwarnings("ignore", message="Sparse")
    with on_device(given):
        for index, (name, (strategy, density)) in enumerate(STRUCTURES.items()):
            try:
                compare(given, report, name, strategy, density, until=(index + 1) / len(STRUCTURES))
            except (RuntimeError, NotImplementedError, ValueError, AssertionError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                report.say(f"ViT, {name}", f"torch {torch.__version__} cannot run it here: {reason[:160]}")


def compare(given: Options, report: Report, name: str, strategy: Strategy, density: float, *, until: float) -> None:
    """Compare one structure with dense kernels."""
    is_gpu = given.device == "cuda"
    num_images, pixels = (64, 224) if is_gpu and not given.is_quick else (8, 32)
    images, labels = loop.batch(given, num_images, pixels)
    ours: dict[str, Trainer] = {}
    for kind in ("kernels", "masked", "dense"):
        model = network(given)
        mlps = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".mlp" in n]
        others = tuple(n for n, p in model.named_parameters() if p.ndim > 1 and n.removesuffix(".weight") not in mlps)
        sparse = (
            {} if kind == "dense" else {"method": strategy, "density": density, "dense_layers": maskable(model, others)}
        )
        settings = {"method": "dense", "precision": loop.precision(given), **sparse}
        ours[kind] = Trainer(model, num_images=num_images, check_every=0, **settings)  # type: ignore[arg-type]
    dtype = torch.bfloat16 if is_gpu else torch.float32
    make = {"2:4": two_of_four, "block": blocks}[name]
    worst, masks = 0.0, ours["kernels"].sparsifier.masks
    if not masks:
        raise NotRunError("no layer is sparse")
    for layer_name, layer in ours["kernels"].engine.model.named_modules():
        if f"{layer_name}.weight" not in masks or not isinstance(layer, nn.Linear):
            continue
        mask = masks[f"{layer_name}.weight"]
        products = make(mask)
        sample = torch.randn(256, mask.shape[1], device=mask.device)
        with torch.no_grad():
            expected = linear(sample.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
            found = sparse_linear(layer, products, dtype, sample)
        worst = max(worst, float((expected - found).abs().max() / expected.abs().max()))
        layer.forward = functools.partial(sparse_linear, layer, products, dtype)  # type: ignore[method-assign]
    report.check(f"ViT, {name}: outputs", worst <= LARGEST, f"largest difference {worst:.1e}", f"≤ {LARGEST:g}")
    legs = {kind: lambda each=each: each.step(images, labels) for kind, each in ours.items()}  # type: ignore[misc]
    times = interleaved(legs, report, until=until)
    for other in ("masked", "dense"):
        value, text = ratio(times["kernels"], times[other])
        report.say(f"ViT, {name}: kernels / {other}", text, ratio=value)


def maskable(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the parameters that a sparsifier could mask, which it wants named to stay dense."""
    from pipeline.sparse.layers import sparse_weights

    return tuple(name for name in sparse_weights(model) if name in names)
