"""22 bad sweeps: values, variants, seeds, and folders that hold something else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tests.campaigns.bad_configurations import SRUN
from tests.campaigns.cases import CONFIG, INTEGRITY, WRITE, Case, Good
from tests.support.launch import ROOT

OPTIONS: tuple[tuple[list[str], str], ...] = (
    (["--set", "sparsity.densty=0.1,0.2"], "unknown key 'sparsity.densty'; did you mean 'sparsity.density'?"),
    (["--set", "sparsity.density=0.1,2"], "expected a number > 0 and <= 1, got 2.0"),
    (
        ["--set", "sparsity.density"],
        "expected key=value,value,…; do: give values, such as --set sparsity.density=0.1,0.2",
    ),
    (["--set", "sparsity.density=0.1,,0.2"], "a value is empty; do: remove the extra comma"),
    (["--set", "model.args={width: 8,{width: 4}"], "a bracket or quote is not closed"),
    (["--set", "sparsity.density=0.1,0.1"], "0.1 is listed twice"),
    (["--set", "sparsity.density=0.1", "--set", "sparsity.density=0.2"], "sparsity.density has values already"),
    (["--set", "sparsity.density=0.1,0.10"], "density=0.1 and density=0.10 are the same configuration"),
    (["--set", "data.stage=a/b,a_b"], "a/b and a_b would share the folder 'a_b'"),
    (["--set", "seed=1,2"], "seed=1: a sweep sets seed itself; do: use --seeds"),
    (["output_dir=x"], "output_dir=x: a sweep sets output_dir itself; do: use --output"),
    (["--variant", "sparsity.method=set"], "expected 'name: key=value, key=value'; do: write a name ("),
    (
        ["--variant", "a: train.momentum=2"],
        "variant=a,seed=0: train.momentum: expected a number from 0 to 0.999999, got 2.0",
    ),
    (["--variant", "a: plan.timetable=itop"], "variant=a,seed=0: plan: sparsity.method 'rigl_itop' changes masks, but"),
    (["--set", "data.stage=" + 200 * "a"], "expected a folder name of at most 200 characters, got 213"),
    (
        ["--seeds", "5-3"],
        "'5-3' is not a list of seeds; expected N, A-B with A <= B, or A,B,…, with 1 to 10000 different seeds",
    ),
    (["--jobs", "0"], "'0' is not a whole number"),
    (
        ["--set", "sparsity.density=0.1,0.2", "--baseline", "density=0.3"],
        "--baseline density=0.3: is not a combination",
    ),
)


def _sweep(good: Good, folder: Path, *more: str) -> list[str]:
    script = str(ROOT / "launchers" / "sweep.py")
    return [sys.executable, script, "--config", str(good.config), "--output", str(folder / "sweep"), *more]


def _holding(name: str, content: str) -> Callable[[Good, Path], list[str]]:
    def make(good: Good, folder: Path) -> list[str]:
        (folder / "sweep" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "sweep" / name).write_text(content)
        return _sweep(good, folder)

    return make


def _empty_table(good: Good, folder: Path) -> list[str]:
    return [*_sweep(good, folder), "--table"]


CASES = [
    Case("sweep", " ".join(more), CONFIG, says, lambda good, folder, more=more: _sweep(good, folder, *more))  # type: ignore[misc]
    for more, says in OPTIONS
] + [
    Case("sweep", "a folder that holds a run", WRITE, "holds a run, not a sweep", _holding("run.json", "{}")),
    Case(
        "sweep",
        "a damaged record",
        INTEGRITY,
        "is not the record of a sweep: 'members' is missing",
        _holding("sweep.json", "{}"),
    ),
    Case("sweep", "the table of a folder without a sweep", CONFIG, "holds no sweep", _empty_table),
    Case("sweep", "two tasks of srun", CONFIG, "srun has started 2 sweeps, expected one", _sweep, SRUN),
]
