"""What surrounds the code says what is true: Makefile, workflow, hooks, campaigns, citation."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline import __version__
from tests.campaigns.__main__ import campaigns, main

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_header_of_the_makefile_lists_every_target() -> None:
    header = MAKEFILE.split("\nPYTHON ?=")[0]
    targets = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == targets
    assert {name for name in targets if not re.search(rf"\b{name}\b", header)} == {"installed"}


def test_both_demos_are_one_command() -> None:
    """``make demo`` is the demo of version 0.1, whose name to stay is ``demo-long``."""
    plans = [subprocess.check_output(["make", "-n", name], cwd=ROOT, text=True) for name in ("demo", "demo-long")]
    assert plans[0] == plans[1]
    assert "deepspeed --quiet --num_gpus 2 launchers/train.py --config fashion_mnist_s90.yaml --resume auto" in plans[0]


def test_the_workflow_calls_the_command_that_decides() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert "\nmake test " in (ROOT / ".ci/run").read_text()


def test_hooks_run_the_tools_of_the_environment_and_download_nothing() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert (ROOT / hook["entry"].split()[0]).exists()


def test_every_campaign_is_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    files = [path for path in (ROOT / "tests/campaigns").glob("*.py") if path.name != "__main__.py"]
    assert set(campaigns()) == {path.stem for path in files if '__name__ == "__main__"' in path.read_text()}
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name}" in f"\n{printed}" for name in campaigns())
    assert main(["bogus"]) == 64
    assert "bogus is not a campaign" in capsys.readouterr().err


def test_the_citation_is_of_this_version_and_its_papers_are_those_of_the_readme() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    papers = re.findall(r"\(https://arxiv\.org/abs/([\d.]+)\)", (ROOT / "README.md").read_text())
    assert [reference["url"].rpartition("/")[2] for reference in citation["references"]] == papers[:3]
