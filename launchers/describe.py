"""``python -m launchers.describe``: show the density of each layer of a sparse network, and its FLOPs.

No weight is allocated. Slow imports wait until the arguments have been checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from pipeline.command_line import ArgumentParser, add_version, number, run_command, whole_number
from pipeline.config.schema import KEYS
from pipeline.sparse.describe import describe, format_table
from pipeline.sparse.strategy import METHODS

# A dense network has no distribution, and the cost of a changing density depends on the timetable,
# which this command does not know; masks that are chosen by a score depend on the weights.
DESCRIBED_METHODS = [
    name
    for name, strategy in METHODS.items()
    if name != "dense" and strategy.initial_density is None and strategy.initial == "random"
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; an error that a user can cause is one line on stderr."""
    return run_command(build_parser, arguments)


def _describe(options: argparse.Namespace) -> int:
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
    if options.json:
        asked = {**vars(options), "image_size": image_size, "model_args": dict(options.model_args)}
        result = dataclasses.asdict(description)
        left_out = {*result, "json", "run"}
        print(json.dumps({**{key: asked[key] for key in asked if key not in left_out}, **result}))
        return 0
    inference, train = description.inference_flops_ratio, description.train_flops_ratio
    print(format_table(description))
    print(f"\n{options.model}, {image_size}×{image_size} pixels, dense: {description.dense_macs:,} MACs per image")
    print(f"inference FLOPs  {inference:.4f} of the dense network's")
    print(f"training FLOPs   {train:.4f} of the dense network's ({options.method}{_interval(options)})")
    kept = description.active + description.parameters - description.weights
    print(f"parameters       {kept:,} of the dense network's {description.parameters:,}; {description.dense_summary}")
    return 0


def build_parser() -> ArgumentParser:
    """Build the parser of the command line."""
    text = (
        "Print the shape, weights, active weights, density and MACs of each sparse layer, and the FLOPs of inference "
        "and training."
    )
    parser = ArgumentParser(prog="python -m launchers.describe", description=text, allow_abbrev=False)
    add_version(parser)
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="name of the network, such as resnet50, wrn_28_10 or timm/NAME"
    )
    parser.add_argument(
        "--density",
        required=True,
        type=number(0, 1, is_minimum_allowed=False),
        metavar="D",
        help="fraction of the weights that are active, above 0 and at most 1",
    )
    parser.add_argument(
        "--distribution",
        choices=KEYS["sparsity.distribution"].choices,
        default="erk",
        help="how the active weights are divided among the layers (default: %(default)s)",
    )
    parser.add_argument(
        "--image-size",
        type=whole_number(1, (1 << 31) - 1),
        metavar="PIXELS",
        help="height and width of an image in pixels (default: the size that the network was published with)",
    )
    parser.add_argument(
        "--num-classes",
        type=whole_number(1, (1 << 31) - 1),
        metavar="N",
        default=1000,
        help="number of classes that the network distinguishes (default: %(default)s)",
    )
    help_args = "argument for building the network, as under model.args of a configuration"
    parser.add_argument("--model-args", type=_assignment, nargs="+", metavar="KEY=VALUE", default=[], help=help_args)
    help_dense = "name or pattern of weights that stay dense, such as fc.weight or 'layer1.*' (default: none)"
    parser.add_argument("--dense-layers", nargs="+", metavar="PATTERN", default=[], help=help_dense)
    help_method = (
        "method to count the training FLOPs for; only methods with a constant density can be chosen "
        "(default: %(default)s)"
    )
    parser.add_argument("--method", choices=DESCRIBED_METHODS, default="static", help=help_method)
    help_interval = (
        "optimiser steps between topology updates; matters only for methods that grow weights by gradient, which need "
        "the dense gradient at each update (default: %(default)s)"
    )
    parser.add_argument(
        "--update-interval", type=whole_number(1, (1 << 31) - 1), metavar="STEPS", default=100, help=help_interval
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=_describe)
    return parser


def _interval(options: argparse.Namespace) -> str:
    return f", an update every {options.update_interval} steps" if METHODS[options.method].grow else ""


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


if __name__ == "__main__":
    sys.exit(main())
