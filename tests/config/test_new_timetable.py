"""A timetable is one function and one row of TIMETABLES, as CONTRIBUTING says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROBE = """
from pipeline.config.timetables import TIMETABLES, PhaseOutline, Timetable

def twice(num_refinements):
    return [PhaseOutline(f"exploration-{number}", "exploration") for number in (1, 2)]

TIMETABLES["twice"] = Timetable(twice, "two explorations, one after the other")

from launchers.config_reference import markdown
from pipeline.config.load import load_config
from pipeline.errors import ConfigError
from pipeline.plan import build_plan

given = ["data.train=train.beton", "data.val=val.beton", "plan.timetable=twice", "plan.exploration.length=10 epochs"]
plan = build_plan(load_config("imagenet_r50_s90", given), steps_per_epoch=100)
print([(phase.name, phase.start, phase.stop, phase.ticket_index) for phase in plan.phases])
print("- `twice`: two explorations, one after the other." in markdown())
try:
    load_config("imagenet_r50_s90", [*given, "sparsity.method=static"])
except ConfigError as error:
    print(error.what)
"""


def test_one_function_and_one_row_add_a_timetable() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == ""
    phases, is_documented, refusal = done.stdout.splitlines()
    assert phases == "[('exploration-1', 0, 1000, 0), ('exploration-2', 1000, 2000, 1)]"
    assert is_documented == "True"
    assert "'twice' needs a method that changes masks, but sparsity.method 'static' does not" in refusal
