"""The reference page and ``--help-config``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launchers.config_reference import markdown, reference
from pipeline.config.keys import LENGTH_UNIT
from pipeline.config.schema import KEYS
from pipeline.config.timetables import TIMETABLES
from pipeline.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_the_page_is_current() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown(), "run python -m tools.configuration_reference"


def test_every_key_and_timetable_is_on_the_page() -> None:
    page, text = markdown(), reference()
    shown = [name for name in KEYS if not name.startswith("plan.refinement.")]  # as those of exploration
    sections = [name for name in shown if KEYS[name].section and "." not in name]
    assert len(shown) > 100
    assert [name for name in shown if f"| `{name}` | " not in page] == sections
    assert [name for name in shown if f"  {name}: " not in text] == sections
    assert all(f"\n### {name}\n" in page for name in sections)
    assert all(f"- `{name}`: " in page for name in TIMETABLES)


def test_every_key_has_help_and_a_default_within_its_own_bounds() -> None:
    for name, key in KEYS.items():
        assert key.help, name
        assert not key.choices or key.default is None or key.default in key.choices, name
        if key.bounds and key.unit != LENGTH_UNIT and key.default is not None:
            assert key.allows(key.default), name


def test_the_example_of_the_scaling_rule_is_right() -> None:
    # 1024 / 128 = 8: the rate is 8 times as high, 4000 / 8 = 500 steps; 512000 / 1024 = 500; 90 · 1251 = 112590
    text = " ".join(reference().split())
    assert "rate of 0.1 becomes 0.8, `4000 steps` become 500 steps, `512000 samples` are 500 steps" in text
    assert "`90 epochs` are 112590 steps" in text


def test_one_key_and_one_section() -> None:
    assert reference("sparsity.density") == (
        "  sparsity.density: number; default 0.1; > 0 and <= 1; fixed\n"
        "      fraction of the weights of sparse layers that are active\n"
    )
    section = reference("plan.refinement")
    assert section.startswith("plan.refinement\nOne phase of the plan. The same keys are in `plan.exploration`.\n")
    assert "  plan.refinement.lr.value: number; default 0.1; >= 0; fixed\n" in section
    assert "plan.exploration." not in section.replace("`plan.exploration.lr`", "")


@pytest.mark.parametrize("name", ["sparsity.densty", "densty"])
def test_an_unknown_key_is_one_line_with_the_nearest_spelling(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reference(name)
    assert f"--help-config: unknown key '{name}'; did you mean 'sparsity.density'?" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_option_needs_no_configuration_and_no_torch() -> None:
    code = (
        "import sys\n"
        "from launchers import train_cli\n"
        "try:\n"
        "    train_cli.main(lambda: None, ['--help-config', 'data.order'])\n"
        "finally:\n"
        "    print({'torch', 'numpy', 'deepspeed'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == reference("data.order") + "set()\n"
