"""Describe the sparse layers of a network for a density and a distribution, and count its FLOPs.

Nothing is computed and no weight is made. Nothing heavy is imported before the arguments are checked.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.sparse.strategy import Strategy

if TYPE_CHECKING:
    from torch import nn

    from pipeline.sparse.dense import DenseWeight


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weight: number of active values, and multiply-accumulates of its dense product for one image."""

    name: str
    shape: tuple[int, ...]
    weights: int
    active: int
    density: float
    macs: int


@dataclasses.dataclass(frozen=True)
class Description:
    """The sparse layers and their totals.

    FLOPs are those of the whole network, dense layers included, divided by those of the dense network.
    """

    layers: list[Layer]
    dense_layers: list[Layer]  # kept dense by name: in the FLOPs, but not in the totals before them
    weights: int
    active: int
    density: float
    dense_macs: int
    inference_flops_ratio: float
    train_flops_ratio: float
    dense_weights: list[DenseWeight]  # all that have no mask, by name or because they cannot
    parameters: int  # of the whole network, biases and norms included
    network_density: float  # active weights and dense parameters, over all parameters
    dense_summary: str  # the last three in a sentence


def describe(
    model: nn.Module,
    *,
    density: float,
    distribution: str,
    image_size: int,
    strategy: Strategy,
    update_interval: int,
    dense_layers: Sequence[str] = (),
) -> Description:
    """Distribute ``density`` over the sparse layers of ``model``, by exact counts, and count MACs for one square image.

    The model may be on any device. A structure of the strategy rounds the counts.

    Raises:
        ConfigError: the model does not accept images of this size, a pattern matches no layer, no
            layer or weight is left, or a layer cannot have the structure.
    """
    from pipeline.sparse.dense import dense_part
    from pipeline.sparse.distribution import densities_of, exact_counts, structured_counts
    from pipeline.sparse.flops import MIXED, dense_flops, flops_at, layer_macs, mixed_density
    from pipeline.sparse.layers import forms_of, sparse_weights

    shapes = {name: tuple(weight.shape) for name, weight in sparse_weights(model, dense_layers).items()}
    sizes = {name: weight.numel() for name, weight in sparse_weights(model).items()}
    if not shapes:
        raise ConfigError("dense layers: no sparse layer is left", do="keep fewer layers dense")
    forms = forms_of(model)
    densities = densities_of({name: forms[name] for name in shapes}, distribution, density)
    counts = structured_counts(exact_counts(shapes, densities, density), shapes, forms, strategy.structure)
    num_sparse, num_active = sum(sizes[name] for name in shapes), sum(counts.values())
    if not num_active:
        raise ConfigError(
            f"density: {density} of {num_sparse} weights is none", do="give a larger one, or fewer dense layers"
        )
    try:
        macs = layer_macs(model, (3, image_size, image_size))
    except Exception as error:  # from the network's own code, which may raise anything
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        do = "give a size that the network takes, or arguments that make it take this one (--model-args)"
        raise ConfigError(
            f"image size: the network does not run on {image_size}×{image_size} pixels: {why}", do=do
        ) from error

    def layer(name: str, shape: tuple[int, ...], active: int) -> Layer:
        return Layer(
            name, shape, sizes[name], active, active / sizes[name], macs.get(name, 0) + macs.get(name + MIXED, 0)
        )

    sparse = [layer(name, shape, counts[name]) for name, shape in shapes.items()]
    dense = [
        layer(name, tuple(w.shape), sizes[name]) for name, w in sparse_weights(model).items() if name not in shapes
    ]
    reached = {row.name: row.density for row in sparse}
    reached |= {name + MIXED: mixed_density(reached[name], forms[name].copies) for name in shapes}
    part = dense_part(model, shapes, dense_layers)
    f_dense, f_sparse = dense_flops(macs), flops_at(macs, reached)
    return Description(
        layers=sparse,
        dense_layers=dense,
        weights=num_sparse,
        active=num_active,
        density=num_active / num_sparse,
        dense_macs=sum(macs.values()),
        inference_flops_ratio=f_sparse / f_dense,
        train_flops_ratio=train_flops(strategy, f_sparse, f_dense, update_interval=update_interval) / (3 * f_dense),
        dense_weights=list(part.weights),
        parameters=num_sparse + part.num_parameters,
        network_density=part.network_density(num_active, num_sparse),
        dense_summary=part.summary(num_active, num_sparse),
    )


def train_flops(strategy: Strategy, f_sparse: float, f_dense: float, *, update_interval: int) -> float:
    """Return mean training FLOPs per sample at a constant density; those of a dense network are 3 f_D."""
    from pipeline.sparse.criteria import reads
    from pipeline.sparse.flops import rigl_flops_per_sample, snfs_flops_per_sample

    if "average" in reads(strategy):
        return snfs_flops_per_sample(f_sparse, f_dense)
    if "gradient" in reads(strategy):
        return rigl_flops_per_sample(f_sparse, f_dense, update_interval)
    return 3 * f_sparse


def format_table(description: Description) -> str:
    """Format one line per layer, dense layers last, and the totals."""
    header = ("layer", "shape", "weights", "active", "density", "MACs")
    rows = [
        (
            row.name,
            "×".join(map(str, row.shape)),
            f"{row.weights:,}",
            f"{row.active:,}",
            f"{row.density:.4f}",
            f"{row.macs:,}",
        )
        for row in (*description.layers, *description.dense_layers)
    ]
    total = (f"{len(description.layers)} sparse layers", "", f"{description.weights:,}", f"{description.active:,}")
    rows.append((*total, f"{description.density:.4f}", f"{sum(row.macs for row in description.layers):,}"))
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    lines.insert(len(lines) - 1, "-" * len(lines[0]))
    return "\n".join(lines)


if __name__ == "__main__":  # until version 0.3
    from pipeline.command_line import report

    sys.exit(report(ConfigError("python -m pipeline.sparse.describe has moved", do="python -m launchers.describe")))
