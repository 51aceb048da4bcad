"""The recipes have the timetables of the papers, and cost what the papers say."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from pipeline.config.load import REPOSITORY_CONFIGS
from pipeline.config.schema import Config
from pipeline.models.names import MODELS
from pipeline.plan import Plan, plan_warnings
from tools.recipe_costs import as_rigl_counts, config_of, costs, plan_of
from tools.recipes import FREETICKETS, IMAGENET, NETWORKS, PAGE, SET, Row, cost_line, page, recipes


@dataclass(frozen=True)
class Timetable:
    """What a paper says about a recipe, at the paper's batch."""

    tickets: list[int]  # epochs after which there is one
    rates: dict[float, float]  # epoch -> learning rate from there
    interval: int | None  # ΔT in exploration, in steps
    drop: tuple[float, float] = (0.5, 0.005)  # at the first and the last step of exploration
    openings: list[int] = field(default_factory=list)  # epochs at which a large update comes
    batch: int = 128


WARM_UP = {0: 0.1 / 6, 1: 0.2 / 6, 4: 0.5 / 6, 5: 0.1}  # (epoch + 1) / 6 of 0.1
STEPS = WARM_UP | {29: 0.1, 30: 0.01, 60: 1e-3, 90: 1e-4, 99: 1e-4}
IMAGENET_SUP = Timetable(
    [92, 94, 96, 98, 100],
    WARM_UP | {29: 0.1, 30: 0.01, 60: 1e-3, 85: 1e-4, 92: 1e-4, 92.5: 3e-4, 93: 5e-4, 93.5: 3e-4, 94: 1e-4, 99: 5e-4},
    4000,
    openings=[92, 94, 96, 98],
)
CIFAR_SUP = Timetable(
    [226, 234, 242, 250],
    {0: 0.1, 112: 0.1, 113: 0.01, 169: 1e-3, 226: 1e-3, 228: 3e-3, 230: 5e-3, 232: 3e-3, 234: 1e-3, 246: 5e-3},
    1000,
    (0.5, 0.5),
    [226, 234, 242],
)
RIGL_RATES = {0: 1.6 / 6, 5: 1.6, 29: 1.6, 30: 0.16, 70: 0.016, 90: 1.6e-3}
EDST_CIFAR = {0: 0.1, 149: 0.1, 150: 0.01, 200: 1e-3, 250: 0.01, 300: 1e-3, 350: 0.01, 400: 1e-3}
CIFAR = {
    "dense": Timetable([250], {0: 0.1, 124: 0.1, 125: 0.01, 187: 1e-3}, None),
    "itop": Timetable([250], {0: 0.1, 124: 0.1, 125: 0.01, 187: 1e-3}, 4000),
    "granet": Timetable([250], {0: 0.1, 124: 0.1, 125: 0.01, 187: 1e-3}, 1000, (0.5, 0.0)),
    "sup": CIFAR_SUP,
    "granet_sup": CIFAR_SUP,
    "wrn28_s80_edst": Timetable([250, 350, 450], EDST_CIFAR, 1000, (0.5, 0.5), [250, 350]),
}
PUBLISHED = {
    "imagenet_r50_dense": Timetable([100], STEPS, None),
    "imagenet_r50_itop": Timetable([100], STEPS, 4000),
    "imagenet_r50_itop_2x": Timetable([200], WARM_UP | {59: 0.1, 60: 0.01, 120: 1e-3, 180: 1e-4}, 4000),
    "imagenet_r50_rigl": Timetable([100], RIGL_RATES, 100, (0.3, 0.0), batch=4096),
    "imagenet_r50_rigl_5x": Timetable(
        [500], {5: 1.6, 149: 1.6, 150: 0.16, 350: 0.016, 450: 1.6e-3}, 100, (0.3, 0.0), batch=4096
    ),
    "imagenet_r50_set": Timetable([100], RIGL_RATES, 100, (0.3, 0.0), batch=4096),
    "imagenet_r50_granet": Timetable([100], STEPS, 4000, (0.5, 0.0)),
    "imagenet_r50_s80": IMAGENET_SUP,
    "imagenet_r50_s90": IMAGENET_SUP,
    "imagenet_r50_granet_sup": Timetable(IMAGENET_SUP.tickets, IMAGENET_SUP.rates, 4000, (0.5, 0.0), [92, 94, 96, 98]),
    "imagenet_r50_s80_edst": Timetable(
        [100, 170, 240, 310], STEPS | {100: 0.01, 130: 1e-3, 160: 1e-4, 170: 0.01}, 4000, openings=[100, 170, 240]
    ),
    # the peak of ffcv-imagenet is 1.7 at 1024 samples per step; half of it is left in the middle of the cosine
    "imagenet_r50_fast": Timetable([40], {0: 1.7 / 8 / 3, 2: 1.7 / 8 * 0.9938, 20: 1.7 / 16}, 4000),
    "cifar10_wrn28_s90_sup": CIFAR_SUP,
    **{f"{data}_{name}": table for data in ("cifar10", "cifar100") for name, table in CIFAR.items()},
}


def rate_at(plan: Plan, epoch: float) -> float:
    step = round(epoch * plan.steps_per_epoch)
    return plan.at(step).lr(step)


def test_every_recipe_is_held_to_its_paper() -> None:
    assert [path.stem for path in recipes()] == sorted(PUBLISHED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_timetable_is_that_of_the_paper(name: str) -> None:
    table, config = PUBLISHED[name], config_of(name)
    plan, scale = plan_of(config), config.train.global_batch / table.batch
    assert config.plan.reference_batch == table.batch
    ends = [phase.stop for phase in plan.phases if phase.ticket_index is not None]
    assert ends == [epoch * plan.steps_per_epoch for epoch in table.tickets]
    rates = {epoch: rate_at(plan, epoch) / scale for epoch in table.rates}
    assert rates == pytest.approx(table.rates, rel=5e-3)  # between epochs a rate is that of the nearest step
    schedule = plan.phases[0].update_schedule
    openings = [phase.start for phase in plan.phases if phase.update_schedule.opening_drop is not None]
    assert openings == [epoch * plan.steps_per_epoch for epoch in table.openings]
    assert schedule.update_interval == (None if table.interval is None else round(table.interval / scale))
    if table.interval is not None:
        drops = schedule.drop_schedule(0), schedule.drop_schedule(plan.phases[0].stop)
        assert drops == pytest.approx(table.drop)
    late = [
        text for text in plan_warnings(plan) if "hardly trained" not in text
    ]  # with a constant drop fraction, as published
    assert late == []


def test_rigl_stops_updating_after_three_quarters_and_granet_ends_at_its_density() -> None:
    for name in ("imagenet_r50_rigl", "imagenet_r50_rigl_5x", "imagenet_r50_set"):
        plan = plan_of(config_of(name))
        last = plan.phases[0].update_steps()[-1] / plan.num_steps
        assert 0.74 < last <= 0.75, name
    for name, epoch in (("imagenet_r50_granet", 30), ("imagenet_r50_granet_sup", 30), ("cifar10_granet", 110)):
        plan = plan_of(config_of(name))
        schedule = plan.phases[0].update_schedule
        assert schedule.density_until == epoch * plan.steps_per_epoch, name
        assert schedule.density_schedule is not None
        assert (schedule.density_schedule(0), schedule.density_schedule(schedule.density_until)) == (0.5, 0.1), name


def test_set_itop_has_its_own_interval_and_seven_tickets_take_850_epochs() -> None:
    plan = plan_of(config_of("cifar10_itop", "sparsity.method=set_itop"))
    assert plan.phases[0].update_schedule.update_interval == 1500
    plan = plan_of(config_of("cifar10_wrn28_s80_edst", "plan.num_refinements=7"))
    assert plan.num_steps == 850 * plan.steps_per_epoch
    assert sum(phase.ticket_index is not None for phase in plan.phases) == 7


@pytest.mark.parametrize(
    "row", [row for row in (*IMAGENET, *FREETICKETS) if row.train is not None], ids=lambda row: row.name
)
def test_flops_ratios_are_the_published_ones(row: Row) -> None:
    config = config_of(row.config, *row.overrides)
    cost = costs(config)
    train, test = as_rigl_counts(config) if row.is_counted_by_rigl else (cost.train, cost.test)
    assert train == pytest.approx(row.train, abs=0.01)
    assert row.test is None or test == pytest.approx(row.test, abs=0.01)
    # what a run counts: convolutions and linear layers, and the updates that it makes
    num_dense_runs = cost.epochs / 100 if row in IMAGENET else 1
    assert cost.train / num_dense_runs == pytest.approx(row.train / num_dense_runs, abs=0.01)


def test_the_ratios_of_set_follow_no_one_rule() -> None:
    found = {row.name: (round(costs(config_of(row.config, *row.overrides)).test, 3), row.test) for row in SET}
    assert found == {
        "SET, first layer dense, 80%": (0.223, 0.23),
        "SET, first layer dense, 90%": (0.126, 0.10),
        "SET, all layers equal, 80%": (0.2, 0.23),
        "SET, all layers equal, 90%": (0.1, 0.10),
    }


def test_costs_are_those_that_a_run_counts() -> None:
    cost = costs(config_of("fashion_mnist_s90"))  # README shows the table of this run: train × 0.153, test × 0.151
    assert (round(cost.train, 3), round(cost.test, 3), cost.num_tickets) == (0.153, 0.151, 4)


def test_cifar_100_costs_what_cifar_10_does_but_for_the_classifier() -> None:
    for model in NETWORKS.values():
        for density in (0.1, 0.02):
            given = f"model.name={model}", f"sparsity.density={density}"
            ten, hundred = (costs(config_of(f"{data}_itop", *given)).test for data in ("cifar10", "cifar100"))
            assert abs(ten - hundred) < 0.01, (model, density)
    sets = costs(config_of("cifar10_sup", "sparsity.method=set_itop")).train, costs(config_of("cifar10_sup")).train
    assert sets[0] == pytest.approx(sets[1], abs=1e-3)


def test_names_tell_runs_apart_and_files_name_real_models() -> None:
    assert config_of("imagenet_r50_rigl_5x", "sparsity.density=0.2").name == "imagenet_r50_rigl_5x_d0.2"
    name = config_of("cifar100_granet_sup", "model.name=cifar_vgg19").output_dir
    assert name == "runs/cifar100_cifar_vgg19_granet_sup_d0.1"
    configs: list[Config] = [config_of(path.name) for path in recipes()]
    assert len({config.name for config in configs}) == len(configs)
    assert {config.model.name for config in configs} | set(NETWORKS.values()) <= set(MODELS)


def test_headers_and_the_page_are_current() -> None:
    assert page() == PAGE.read_text(), "run python -m tools.recipes"
    for path in recipes():
        text = path.read_text()
        assert cost_line(path.name) in text.splitlines(), f"{path.name}: run python -m tools.recipes"
        assert f"--config {path.name} data.train=" in text
        assert all(word in text for word in ("# paper ", "# command ", "# data ", "# hardware ", "# expect "))
        assert path.parent == REPOSITORY_CONFIGS
