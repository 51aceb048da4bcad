"""``python -m pipeline.sparse.describe``: what a density and a distribution make of a network, layer by layer, and what it costs.

Nothing is computed and no weight is made. Nothing heavy is imported before the arguments are checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.command_line import ArgumentParser
from pipeline.errors import ConfigError, RunError
from pipeline.schema import CHOICES
from pipeline.sparse.strategy import METHODS, Strategy

if TYPE_CHECKING:
    from torch import nn

# A dense network has no distribution, and what a changing density costs depends on the timetable: --print-plan knows it.
DESCRIBED_METHODS = [name for name, strategy in METHODS.items() if name != "dense" and strategy.initial_density is None]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weight: how many of its values are active, and the multiply-accumulates of its dense product for one image."""

    name: str
    shape: tuple[int, ...]
    weights: int
    active: int
    density: float
    macs: int


@dataclasses.dataclass(frozen=True)
class Description:
    """The sparse layers and their totals; FLOPs are those of the whole network, dense layers included, over the dense network's."""

    layers: list[Layer]
    dense_layers: list[Layer]  # kept dense by name: in the FLOPs, but not in the totals before them
    weights: int
    active: int
    density: float
    dense_macs: int
    inference_flops_ratio: float
    train_flops_ratio: float


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
    """Spread ``density`` over the sparse layers of ``model``, on any device, by exact counts, and add up MACs for one square image.

    Raises:
        ConfigError: the model takes no images of this size, a pattern matches no layer, or no layer or weight is left.
    """
    from pipeline.sparse.distribution import DISTRIBUTIONS, exact_counts
    from pipeline.sparse.flops import dense_flops, flops_at, layer_macs
    from pipeline.sparse.layers import sparse_weights

    shapes = {name: tuple(weight.shape) for name, weight in sparse_weights(model, dense_layers).items()}
    sizes = {name: weight.numel() for name, weight in sparse_weights(model).items()}
    if not shapes:
        raise ConfigError("dense layers: no sparse layer is left", do="keep fewer layers dense")
    counts = exact_counts(shapes, DISTRIBUTIONS[distribution](shapes, density), density)
    num_sparse, num_active = sum(sizes[name] for name in shapes), sum(counts.values())
    if not num_active:
        raise ConfigError(f"density: {density} of {num_sparse} weights is none", do="give a larger one, or fewer dense layers")
    try:
        macs = layer_macs(model, (3, image_size, image_size))
    except Exception as error:  # from the network's own code, which may raise anything
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        do = "give a size that the network takes, or arguments that make it take this one (--model-args)"
        raise ConfigError(f"image size: the network does not run on {image_size}×{image_size} pixels: {why}", do=do) from error

    def layer(name: str, shape: tuple[int, ...], active: int) -> Layer:
        return Layer(name, shape, sizes[name], active, active / sizes[name], macs.get(name, 0))

    sparse = [layer(name, shape, counts[name]) for name, shape in shapes.items()]
    dense = [layer(name, tuple(w.shape), sizes[name]) for name, w in sparse_weights(model).items() if name not in shapes]
    f_dense, f_sparse = dense_flops(macs), flops_at(macs, {row.name: row.density for row in sparse})
    return Description(
        layers=sparse,
        dense_layers=dense,
        weights=num_sparse,
        active=num_active,
        density=num_active / num_sparse,
        dense_macs=sum(macs.values()),
        inference_flops_ratio=f_sparse / f_dense,
        train_flops_ratio=train_flops(strategy, f_sparse, f_dense, update_interval=update_interval) / (3 * f_dense),
    )


def train_flops(strategy: Strategy, f_sparse: float, f_dense: float, *, update_interval: int) -> float:
    """Mean training FLOPs per sample at a constant density, by what the method's growth reads (a dense network's are 3 f_D)."""
    from pipeline.sparse.criteria import reads
    from pipeline.sparse.flops import rigl_flops_per_sample, snfs_flops_per_sample

    if "average" in reads(strategy):
        return snfs_flops_per_sample(f_sparse, f_dense)
    if "gradient" in reads(strategy):
        return rigl_flops_per_sample(f_sparse, f_dense, update_interval)
    return 3 * f_sparse


def format_table(description: Description) -> str:
    """One line a layer, those kept dense last, and the totals."""
    header = ("layer", "shape", "weights", "active", "density", "MACs")
    rows = [
        (row.name, "×".join(map(str, row.shape)), f"{row.weights:,}", f"{row.active:,}", f"{row.density:.4f}", f"{row.macs:,}")
        for row in (*description.layers, *description.dense_layers)
    ]
    total = (f"{len(description.layers)} sparse layers", "", f"{description.weights:,}", f"{description.active:,}")
    rows.append((*total, f"{description.density:.4f}", f"{sum(row.macs for row in description.layers):,}"))
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    lines.insert(len(lines) - 1, "-" * len(lines[0]))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; an error a user can cause is one line on stderr."""
    try:
        options = build_parser().parse_args(arguments)
        from pipeline import models

        image_size = options.image_size or models.image_size(options.model)
        description = describe(
            models.outline(options.model, num_classes=options.num_classes, args=dict(options.model_args)),
            density=options.density,
            distribution=options.distribution,
            image_size=image_size,
            strategy=METHODS[options.method],
            update_interval=options.update_interval,
            dense_layers=options.dense_layers,
        )
    except RunError as error:
        print(f"ERROR[{error.code}] {error}", file=sys.stderr)
        return error.code
    if options.json:
        asked = {**vars(options), "image_size": image_size, "model_args": dict(options.model_args)}
        result = dataclasses.asdict(description)
        print(json.dumps({**{key: asked[key] for key in asked if key not in result and key != "json"}, **result}))
        return 0
    inference, train = description.inference_flops_ratio, description.train_flops_ratio
    print(format_table(description))
    print(f"\n{options.model}, {image_size}×{image_size} pixels, dense: {description.dense_macs:,} MACs an image")
    print(f"inference FLOPs  {inference:.4f} of the dense network's")
    print(f"training FLOPs   {train:.4f} of the dense network's ({options.method}{_interval(options)})")
    return 0


def build_parser() -> ArgumentParser:
    """The arguments."""
    text = "Print shape, weights, active weights, density and MACs of each sparse layer, and what inference and training cost."
    parser = ArgumentParser(prog="python -m pipeline.sparse.describe", description=text, allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="NAME", help="a name of pipeline.models: resnet50, wrn_28_10, timm/…")
    parser.add_argument("--density", required=True, type=_density, metavar="D", help="share of active weights, above 0 and at most 1")
    parser.add_argument("--distribution", choices=CHOICES["sparsity.distribution"], default="erk", help="default: %(default)s")
    parser.add_argument("--image-size", type=_whole, metavar="PIXELS", help="height and width (default: what the network is published for)")
    parser.add_argument("--num-classes", type=_whole, metavar="N", default=1000, help="default: %(default)s")
    help_args = "arguments of the network, as model.args of a configuration has them"
    parser.add_argument("--model-args", type=_assignment, nargs="+", metavar="KEY=VALUE", default=[], help=help_args)
    help_dense = "name patterns of weights that stay dense, such as fc.weight or 'layer1.*'"
    parser.add_argument("--dense-layers", nargs="+", metavar="PATTERN", default=[], help=help_dense)
    help_method = "whose training FLOPs; those of constant density (default: %(default)s)"
    parser.add_argument("--method", choices=DESCRIBED_METHODS, default="static", help=help_method)
    help_interval = "steps from update to update, where growth reads the gradient (default: %(default)s)"
    parser.add_argument("--update-interval", type=_whole, metavar="STEPS", default=100, help=help_interval)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser


def _interval(options: argparse.Namespace) -> str:
    return f", an update every {options.update_interval} steps" if METHODS[options.method].grow else ""


def _density(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value <= 1.0:  # nan is neither
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0 and at most 1")
    return value


def _whole(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    sys.exit(main())
