"""Measure what masks cost, beside published code and installable packages.

``python -m benchmarks.masks``

ResNet-50 (54 sparse tensors, 25,502,912 weights) and ViT-B/16, 90% ERK, one thread. Parts, for
``--only``:

S1 S2     an ordinary step: sparse, as the engines take it, / plain fused SGD; published masking / ours
S3 S4     a topology update, by gradient and at random: published / ours
breakdown where the time of an update goes, line by line
methods   the time of an update, for every method under every scope
size      the cost as a function of the number of weights
memory    the memory that masks occupy, and the peak of an update
peers     rigl-torch and sparsimony / ours, on the first network, on the CPU; prints how to install
          them if they are missing
R1        a training step of ResNet-50 on two ranks: all checks on / off (``benchmarks.checks``)

All parts take tens of minutes; ``--only``, ``--models`` and ``--runs 1`` shorten this. Ends with an
error only on a wrong result: masks that differ from those of a stable full sort, or inexact counts.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable

from torch import nn

from benchmarks import checks, memory, peers
from benchmarks.support.bars import Bounds, Figure, Leg, Options, Results, Rounds, bar, in_turn, median_ms, options
from benchmarks.support.breakdown import Breakdown
from benchmarks.support.workload import DENSITY, Published, Setup, Workload, require_right_masks
from pipeline.sparse.strategy import METHODS, SCOPES, contradictions

BOUNDS = {
    "S1": Bounds("≤ 1.25", "1.10", "1.006"),
    "S2": Bounds("≥ 3", "20", "190"),
    "S3 layer": Bounds("≥ 5", "20", "350"),
    "S3 global": Bounds("≥ 4", "20", "350"),
    "S4": Bounds("≥ 3", "6", "100"),
}
PARTS = ("S1", "S2", "S3", "S4", "breakdown", "methods", "size", "memory", "peers", "R1")
MODELS = ("resnet50", "vit_b_16")
QUICK_MODEL = "cifar_resnet20"
# Prefixes of the fields of a method that say when and how much it updates, but not how.
TIMETABLE = ("update_interval", "drop_", "density_")
Pair = tuple[Leg, Leg, Leg]  # numerator, denominator, preparation of a round


def main() -> None:
    given = options(__doc__, PARTS, models=MODELS, quick_model=QUICK_MODEL)
    results = Results()
    for name in given.models:
        measure(Workload.named(name, given.device), given, results)
        gc.collect()
    if "size" in given.only:
        results.add(cost_against_size(given))
    if "peers" in given.only and given.device == "cpu":
        peers.measure(given.models[0], given, results)
    if "R1" in given.only and given.device == "cpu":
        checks.measure(QUICK_MODEL if given.is_quick else MODELS[0], given, results)
    results.write(given.json)


def measure(workload: Workload, given: Options, results: Results) -> None:
    """Measure all chosen parts on one network."""
    print(
        f"{workload.name}: {workload.num_weights:,} sparse weights, 90% ERK, {given.threads} thread(s), {given.device}",
        flush=True,
    )
    pairs: dict[str, Callable[[Setup], Pair]] = {
        "S1": step_and_plain_step,
        "S2": published_and_our_masking,
        "S3 layer": published_and_our_update,
        "S3 global": published_and_our_update,
        "S4": published_and_our_update,
    }
    for name, legs in pairs.items():
        part, _, scope = name.partition(" ")
        if part not in given.only:
            continue
        method = "set_itop" if part == "S4" else "rigl"
        is_update = part in ("S3", "S4")
        if is_update:
            require_right_masks(Setup(workload, method, scope or "layer"))
        rounds = max(1, given.rounds // 2) if is_update else 3 * given.rounds
        runs: list[Rounds] = []
        for _ in range(given.runs):
            numerator, denominator, prepare = legs(Setup(workload, method, scope or "layer"))
            runs.append(in_turn(numerator, denominator, rounds=rounds, prepare=prepare))
        results.add(bar(name if workload.name == MODELS[0] else f"{name} {workload.name}", runs, BOUNDS[name]))
    if "breakdown" in given.only:
        for method, scope in (("rigl", "layer"), ("rigl", "global"), ("set_itop", "layer")):
            results.add(breakdown(workload, method, scope, rounds=min(3, given.rounds)))
    if "methods" in given.only:
        for methods in updating_methods():
            results.add(update_cost(workload, methods, rounds=min(3, given.rounds)))
    if "memory" in given.only:
        for scope in ("layer", "global"):
            results.add(memory.measure(workload.name, "rigl", scope, given.device))


# -- S1 to S4


def step_and_plain_step(setup: Setup) -> Pair:
    return setup.sparse_step, setup.workload.plain_optimizer().step, lambda: None


def published_and_our_masking(setup: Setup) -> Pair:
    return Published(setup).mask_weights_and_momenta, setup.mask_gradient, lambda: None


def published_and_our_update(setup: Setup) -> Pair:
    published = Published(setup)
    is_random = setup.sparsifier.strategy.grow == "random"
    return published.update_at_random if is_random else published.update_by_gradient, setup.update, setup.refresh


# -- where time goes


def breakdown(workload: Workload, method: str, scope: str, *, rounds: int) -> Figure:
    """List the lines that take at least 3% of an update."""
    setup = Setup(workload, method, scope)
    profile = Breakdown()
    setup.update()
    for _ in range(rounds):
        setup.refresh()
        with profile:
            setup.update()
    lines = {line: ms / rounds for line, ms in profile.milliseconds().items()}
    total = sum(lines.values())
    shown = [f"\n  {ms:7.1f} ms {ms / total:4.0%}  {line}" for line, ms in lines.items() if ms >= 0.03 * total]
    rest = f"\n  {sum(ms for ms in lines.values() if ms < 0.03 * total):7.1f} ms       other lines"
    return Figure(
        f"breakdown {method} {scope} {workload.name}", f"{total:.0f} ms per update" + "".join(shown) + rest, lines
    )


def updating_methods() -> list[list[str]]:
    """Group the methods that replace weights; a group differs only in its timetables."""
    together: dict[tuple[object, ...], list[str]] = {}
    for name, strategy in METHODS.items():
        if strategy.grow is not None and strategy.drop_fraction:
            fields = dataclasses.asdict(strategy) | {"initial_density": strategy.initial_density is not None}
            how = tuple(value for field, value in fields.items() if not field.startswith(TIMETABLE))
            together.setdefault(how, []).append(name)
    return list(together.values())


def update_cost(workload: Workload, methods: list[str], *, rounds: int) -> Figure:
    """Time an update of one group of methods under every scope that goes with it, in ms."""
    costs: dict[str, float] = {}
    setup = Setup(workload, methods[0])
    for scope in SCOPES:
        if any(contradictions(dataclasses.replace(METHODS[methods[0]], scope=scope), DENSITY)):
            continue
        setup.use_scope(scope)
        costs[scope] = median_ms(setup.update, rounds=rounds, prepare=setup.refresh)
    text = ", ".join(f"{scope} {ms:.0f}" for scope, ms in costs.items())
    return Figure(f"update {' = '.join(methods)} {workload.name}", f"{text} ms", costs)


def cost_against_size(given: Options) -> Figure:
    """Measure a network that is 1×, 4× and 16× as large: ViT with 12 layers of width 192, 384, 768."""
    costs: dict[str, list[float]] = {"masking": [], "update layer": [], "update global": []}
    sizes = []
    for width in (12, 24, 48) if given.is_quick else (192, 384, 768):
        workload = Workload(f"vit_width_{width}", _vit(width), given.device)
        sizes.append(workload.num_weights / 1e6)
        setup = Setup(workload)
        costs["masking"].append(median_ms(setup.mask_gradient, rounds=given.rounds) / sizes[-1])
        for scope in ("layer", "global"):
            setup = Setup(workload, "rigl", scope)
            costs[f"update {scope}"].append(
                median_ms(setup.update, rounds=min(3, given.rounds), prepare=setup.refresh) / sizes[-1]
            )
        del workload, setup
        gc.collect()
    parts = [f"{name} {' / '.join(f'{cost:.3g}' for cost in values)}" for name, values in costs.items()]
    text = f"{' / '.join(f'{size:.3g}' for size in sizes)} million weights; ms per million: {', '.join(parts)}"
    numbers = {
        f"{name} {size:.4g}M": cost for name, values in costs.items() for size, cost in zip(sizes, values, strict=True)
    }
    return Figure("size 1× / 4× / 16×", text, numbers)


def _vit(width: int) -> nn.Module:
    from torchvision.models import VisionTransformer

    model: nn.Module = VisionTransformer(
        image_size=224,
        patch_size=16,
        num_layers=12,
        num_heads=3,
        hidden_dim=width,
        mlp_dim=4 * width,
        num_classes=width,
    )
    return model


if __name__ == "__main__":
    main()
