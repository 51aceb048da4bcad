"""The table of methods, the document that shows it, and adding a criterion."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from pipeline.config import schema
from pipeline.config.load import load_config
from pipeline.sparse import criteria
from pipeline.sparse.initial import INITIAL_SCORES
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import DENSITY_SCHEDULES, INITIAL, METHODS, REGROWN, SCOPES, Strategy, method

ROOT = Path(__file__).parents[2]


def row_of(name: str, strategy: Strategy) -> list[str]:
    growth = strategy.grow or "–"
    if strategy.grow_share < 1:
        growth = f"{strategy.grow_share:g} {strategy.grow}, rest {strategy.grow_rest}"
    drop = f"{strategy.drop_schedule} {strategy.drop_fraction:g}"
    drop += {"constant": "", "rigl_cosine": " → 0 at 0.75·T", "stairs": ", half, 0"}.get(
        strategy.drop_schedule, f" → {strategy.drop_end:g}"
    )
    density = "1" if name == "dense" else "constant"
    if strategy.initial_density is not None:
        density = f"{strategy.initial_density:g} → `density`, {strategy.density_schedule}, "
        density += f"{strategy.density_from} to {strategy.density_until}"
    changes = strategy.changes_masks
    timetable = [strategy.update_interval or "–", drop if strategy.drop_fraction else "–"] if changes else ["–", "–"]
    start = strategy.distribution if strategy.initial == "random" else f"by {strategy.initial}"
    return [f"`{name}`", strategy.prune if changes else "–", growth, start, *timetable, density]


def test_the_document_shows_the_table() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if re.match(r"\| `\w+` \|.*\|.*\|.*\|", line)
    ]
    assert rows == [row_of(name, strategy) for name, strategy in METHODS.items()]
    assert {name: row.scope for name, row in METHODS.items() if row.scope != "layer"} == {"dsr": "reallocated"}
    structured = {name: (row.structure, row.min_salient) for name, row in METHODS.items() if row.structure != "none"}
    assert structured == {"srigl": ("fan_in", 0.3)}
    for name in [*criteria.PRUNE, *criteria.GROW, *SCOPES, *REGROWN, *INITIAL, *DENSITY_SCHEDULES]:
        assert f"`{name}`" in text, name


def test_the_configuration_offers_what_the_tables_have() -> None:
    assert set(schema.KEYS["sparsity.prune"].choices) == set(criteria.PRUNE)
    assert set(schema.KEYS["sparsity.grow"].choices) == set(criteria.GROW)
    assert set(schema.KEYS["sparsity.regrown"].choices) == set(REGROWN)
    assert set(schema.KEYS["sparsity.initial"].choices) == set(INITIAL) == set(INITIAL_SCORES)


def test_what_regrows_is_as_each_papers_code_has_it() -> None:
    restarting = {name: row.regrown for name, row in METHODS.items() if row.regrown != "kept"}
    assert restarting == {"granet": "zero_density"}
    needed = ["data.train=train.beton", "data.val=val.beton"]
    recipes = {path.stem: load_config(str(path), needed).sparsity for path in (ROOT / "configs").glob("*.yaml")}
    of_recipes = {name: schema.strategy_of(sparsity).regrown for name, sparsity in recipes.items()}
    restarts = {name: regrown for name, regrown in of_recipes.items() if regrown != "kept"}
    assert restarts == {name: "zero" for name in of_recipes if name.endswith("_edst")} | {
        name: "zero_density" for name in of_recipes if "_granet" in name
    }
    assert {"cifar10_wrn28_s80_edst", "imagenet_r50_s80_edst", "cifar10_granet_sup"} <= restarts.keys()


def test_a_method_is_changed_by_what_is_given() -> None:
    assert method("rigl") == METHODS["rigl"]
    assert method("rigl", scope="global", min_active=None) == Strategy(
        "gradient", scope="global", update_interval="100 steps", drop_schedule="rigl_cosine", drop_fraction=0.3
    )
    assert METHODS["mixed"].grow_stages == (("gradient", 0.5), ("random", 1.0))
    assert criteria.reads(METHODS["mixed"]) == {"gradient", "nothing"}
    assert METHODS["static"].grow_stages == ()


def test_the_example_in_contributing_adds_a_growth_rule() -> None:
    before = dict(criteria.GROW)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (example,) = re.findall(r"```python\n(.*?GROW\[.*?)```", text, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    names: dict[str, object] = {}
    try:
        exec(compile(example, "CONTRIBUTING.md", "exec"), names)
        sparsifier = names["sparsifier"]
        assert isinstance(sparsifier, Sparsifier)
        for weight in sparsifier.weights.values():
            weight.grad = torch.zeros_like(weight)
        sparsifier.before_step(1.0)  # all 4 of 8 are pruned, and the last 4 grow
        sparsifier.after_step()
        assert sparsifier.masks["weight"].int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    finally:
        criteria.GROW.clear()
        criteria.GROW.update(before)
