"""``python -m tools.recipes``: write ``configs/README.md``, and the line ``cost`` in the header of each recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config.load import REPOSITORY_CONFIGS
from tools.recipe_costs import Costs, as_rigl_counts, config_of, costs

PAGE = REPOSITORY_CONFIGS / "README.md"
UNKNOWN = "not known to us"
COST = re.compile(r"^# cost .*$", re.MULTILINE)
DATA_SETS = ("imagenet", "cifar")  # beginnings of the names of the papers' recipes


@dataclass(frozen=True)
class Row:
    """A row of a paper's table."""

    name: str  # method and sparsity
    config: str
    overrides: tuple[str, ...] = ()
    top1: str = ""  # published, in %
    train: float | None = None  # published training FLOPs ratio
    test: float | None = None  # published inference FLOPs ratio
    num_runs: int = 1  # independent runs, one for each seed (DST ensembles)
    is_counted_by_rigl: bool = True  # whether the published ratios are of RigL's formula


Pair = tuple[float | None, float | None]
ERK: Pair = (0.42, 0.24)  # published inference ratios
NONE: Pair = (None, None)


def _both(
    name: str, config: str, top1: tuple[str, str] = ("", ""), train: Pair = NONE, test: Pair = NONE
) -> tuple[Row, Row]:
    """Return the rows for 80% and for 90% sparsity of a recipe whose default is 90%."""
    return (
        Row(f"{name}, 80%", config, ("sparsity.density=0.2",), top1[0], train[0], test[0]),
        Row(f"{name}, 90%", config, (), top1[1], train[1], test[1]),
    )


IMAGENET = (
    Row("dense", "imagenet_r50_dense", (), "76.8", 1.0, 1.0, is_counted_by_rigl=False),
    *_both("RigL", "imagenet_r50_rigl", ("75.1", "73.0"), (0.42, 0.25), ERK),
    *_both("RigL, 5×", "imagenet_r50_rigl_5x", ("77.17", "76.42"), (2.09, 1.23), ERK),
    *_both("RigL-ITOP", "imagenet_r50_itop", ("75.84 ± 0.05", "73.82 ± 0.08"), (0.42, 0.25), ERK),
    *_both("RigL-ITOP, 2×", "imagenet_r50_itop_2x", ("76.9", "75.5"), (0.84, 0.50), ERK),
    *_both("GraNet", "imagenet_r50_granet"),
    Row("EDST, M = 4, 80%", "imagenet_r50_s80_edst"),
    Row("EDST, M = 4, 90%", "imagenet_r50_s80_edst", ("sparsity.density=0.1", "name=imagenet_r50_s90_edst")),
    Row("DST, M = 4, 80%", "imagenet_r50_itop", ("sparsity.density=0.2",), num_runs=4),
    Row("DST, M = 4, 90%", "imagenet_r50_itop", num_runs=4),
    Row("RigL + Sup-tickets, 80%", "imagenet_r50_s80"),
    Row("RigL + Sup-tickets, 90%", "imagenet_r50_s90"),
    *_both("GraNet + Sup-tickets", "imagenet_r50_granet_sup"),
    Row("fast, no paper's, 90%", "imagenet_r50_fast"),
)
# SET's published ratios follow no one rule: 80% agrees with the first, 90% with the second.
SET = tuple(
    Row(f"SET, {name}, {sparsity}%", "imagenet_r50_set", (*density, *distribution), top1, ratio, ratio)
    for name, distribution in (("first layer dense", ()), ("all layers equal", ("sparsity.distribution=uniform",)))
    for sparsity, density, top1, ratio in ((80, ("sparsity.density=0.2",), "72.9", 0.23), (90, (), "69.6", 0.10))
)
WRN = ("model.name=wrn_28_10",)
DST_INTERVAL = "plan.exploration.update_interval='1000 steps'"
FREETICKETS = (
    Row("EDST, M = 3, 80%", "cifar10_wrn28_s80_edst", train=0.61, is_counted_by_rigl=False),
    Row(
        "EDST, M = 7, 90%",
        "cifar10_wrn28_s80_edst",
        ("sparsity.density=0.1", "plan.num_refinements=7", "name=cifar10_wrn28_s90_edst"),
        train=0.57,
        is_counted_by_rigl=False,
    ),
    Row("DST, M = 3, 80%", "cifar10_itop", (*WRN, "sparsity.density=0.2", DST_INTERVAL), num_runs=3),
    Row("DST, M = 3, 90%", "cifar10_itop", (*WRN, DST_INTERVAL), num_runs=3),
)
CIFAR_METHODS = {
    "RigL-ITOP": "cifar10_itop",
    "GraNet": "cifar10_granet",
    "RigL + Sup-tickets": "cifar10_sup",
    "GraNet + Sup-tickets": "cifar10_granet_sup",
}
NETWORKS = {
    "ResNet-50": "cifar_resnet50",
    "VGG-19": "cifar_vgg19",
    "ResNet-34": "cifar_resnet34",
    "WRN-28-10": "wrn_28_10",
}
DENSITIES = (0.1, 0.05, 0.02)

DATA = "data.train=/data/train.beton data.val=/data/val.beton"
PAGE_TEXT = """\
# Recipes

Every row of the papers' tables that can be configured, the file that trains it, and what it costs.
`--config NAME` finds a file in this folder; what follows a name in a table are overrides for the
command line. `--print-plan` shows the phases, and `--dry-run` tries everything on two steps of each
phase. The recipes follow the papers' timetables and the authors' code. **We have run none of them
to the end except the demo.**

```bash
python launchers/train.py --config imagenet_r50_itop --print-plan sparsity.density=0.2 {data}
deepspeed launchers/train.py --config imagenet_r50_itop sparsity.density=0.2 {data}
# a DST ensemble: independent runs, evaluated together
python launchers/sweep.py --config imagenet_r50_itop --seeds 4 --output runs/dst {data}
python launchers/evaluate.py --tickets runs/dst/*/tickets --use last --data /data/val.beton --output runs/judged
```

**train ×** is the training FLOPs of all tickets together, divided by those of the dense network
(100 epochs of ImageNet, 250 of CIFAR; 40 for the fast recipe). **test ×** is the inference FLOPs of
one ticket; an ensemble of M tickets has M times as many. Both are computed from the plan and the
densities of the layers by `python -m tools.recipes`, which writes this page. While the density of
GraNet falls, layers are taken to have the densities of ERK; a run counts its actual masks. A run of
the fast recipe counts all images at 192 pixels, which changes neither ratio by more than 0.001.

**GPU-hours** are an estimate: the arithmetic of the dense network, because masks save no time on a
GPU, at the rate at which ffcv-imagenet trains ResNet-50 on an A100 (published: 40 epochs in 35.6
minutes on 8 of them). Divide by the number of GPUs. Images of 32 pixels do not fill a GPU, so for
them the estimate is a lower bound.

## The demo

`fashion_mnist_s90` (`make demo`) is Sup-tickets on Fashion-MNIST. Its header has measured results.

## Images of your own

`imagefolder` is a template for folders `class/image`: [docs/own-data.md](../docs/own-data.md).

## ImageNet, ResNet-50

{imagenet}

The published ratios are those of RigL's formula with ΔT = 100 steps, and RigL's code also counts a
bias and a ReLU for each output of a layer. Counted in this way, the recipes give:

{rigl}

SET's published ratios follow no one rule. At 80% they agree with a dense first layer, the default
of the file, and at 90% with the same density in all layers:

{set}

## CIFAR-10 and CIFAR-100

For CIFAR-100 take the file that begins with `cifar100_`; its ratios differ by less than 0.01. The
dense network is `cifar10_dense`. The columns 90%, 95% and 98% are `sparsity.density=0.1`, `0.05`
and `0.02`; a cell is train × / test ×. SET in place of RigL is `sparsity.method=set_itop`, with
ratios that differ by less than 0.001. Published accuracies: {unknown}.

{cifar}

FreeTickets trains WRN-28-10 at 80% and 90%:

{freetickets}
"""


def page() -> str:
    """Return the text of ``configs/README.md``."""
    return PAGE_TEXT.format(
        data=DATA,
        imagenet=_table(IMAGENET),
        rigl=_rigl_table(),
        set=_table(SET),
        cifar=_cifar_table(),
        freetickets=_table(FREETICKETS),
        unknown=UNKNOWN,
    )


def costs_of(row: Row) -> Costs:
    """Compute the costs of a row: of one run, or of ``num_runs`` together."""
    one = costs(config_of(row.config, *(text.replace("'", "") for text in row.overrides)))
    num = row.num_runs
    return Costs(one.train * num, one.test, one.epochs * num, one.num_tickets * num, one.gpu_hours * num)


def published(row: Row) -> str:
    """Return what is published about a row."""
    if not row.top1 and row.train is None:
        return UNKNOWN
    parts = [f"top-1 {row.top1}"] if row.top1 else []
    parts += [
        f"{name} × {ratio:.2f}" for name, ratio in (("train", row.train), ("test", row.test)) if ratio is not None
    ]
    return ", ".join(parts)


def command(config: str, overrides: Sequence[str], num_runs: int = 1) -> str:
    """Return the configuration and its overrides, for a table."""
    seeds = f", `--seeds {num_runs}`" if num_runs > 1 else ""
    return f"`{config}`" + "".join(f" `{text}`" for text in overrides) + seeds


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _table(rows: Sequence[Row]) -> str:
    header = ("row", "configuration", "epochs", "tickets", "train ×", "test ×", "published", "GPU-hours")
    cells = []
    for row in rows:
        cost = costs_of(row)
        figures = [f"{cost.epochs:g}", str(cost.num_tickets), f"{cost.train:.3f}", f"{cost.test:.3f}"]
        cells.append(
            [
                row.name,
                command(row.config, row.overrides, row.num_runs),
                *figures,
                published(row),
                _hours(cost),
            ]
        )
    return _markdown(header, cells)


def _hours(cost: Costs) -> str:
    return f"{cost.gpu_hours:.0f}" if cost.gpu_hours >= 10 else f"{cost.gpu_hours:.1f}"


def _rigl_table() -> str:
    rows = []
    for row in IMAGENET:
        if row.train is not None and row.is_counted_by_rigl:
            train, test = as_rigl_counts(config_of(row.config, *row.overrides))
            rows.append([row.name, f"{train:.3f}", f"{row.train:.2f}", f"{test:.3f}", f"{row.test:.2f}"])
    return _markdown(("row", "train ×", "published", "test ×", "published"), rows)


def _cifar_table() -> str:
    rows = []
    for method, name in CIFAR_METHODS.items():
        for network, model in NETWORKS.items():
            given = (f"model.name={model}",) if network != "ResNet-50" else ()
            config = config_of(name, *given)
            each = [costs(replace(config, sparsity=replace(config.sparsity, density=density))) for density in DENSITIES]
            ratios = [f"{cost.train:.3f} / {cost.test:.3f}" for cost in each]
            rows.append([f"{method}, {network}", command(name, given), *ratios, _hours(each[0])])
    return _markdown(("row", "configuration", "90%", "95%", "98%", "GPU-hours"), rows)


def cost_line(name: str) -> str:
    """Return the line ``cost`` of a recipe's header."""
    config = config_of(name)
    cost = costs(config)
    what = "itself" if config.sparsity.method == "dense" else f"a dense run of {config.plan.dense_reference}"
    return (
        f"# cost       train × {cost.train:.3f}, test × {cost.test:.3f} of {what}; "
        f"about {_hours(cost)} GPU-hours (estimated: configs/README.md)"
    )


def recipes() -> list[Path]:
    """List the files of the papers' recipes; the costs of the demo and of the study are measured."""
    return sorted(path for path in REPOSITORY_CONFIGS.glob("*.yaml") if path.name.startswith(DATA_SETS))


if __name__ == "__main__":
    for path in recipes():
        path.write_text(COST.sub(cost_line(path.name), path.read_text(), count=1))
    PAGE.write_text(page())
    print(f"wrote {PAGE} and the line 'cost' of {len(recipes())} recipes")
