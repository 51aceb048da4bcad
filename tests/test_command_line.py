"""What every command line has in common: its argument types, its one line at the end, and what `| head` does to it."""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import __version__
from pipeline.command_line import error_line, expand_home, local_path, number, path_or_url, whole_number
from pipeline.tracking.__main__ import main as tracking_main

ROOT = Path(__file__).parents[1]
TRAIN = ["launchers/train.py", "--config", "imagenet_r50_s90", "data.train=t.beton", "data.val=v.beton"]
COMMANDS = {
    **{script: [script] for script in ("launchers/train.py", "launchers/evaluate.py", "launchers/sweep.py")},
    **{
        module: ["-m", module]
        for module in ("launchers.run", "launchers.describe", "data_prep", "pipeline.tickets", "pipeline.tracking")
    },
}


@pytest.mark.parametrize(
    ("kind", "accepted", "refused"),
    [
        (whole_number(1, 5), {"1": 1, "5": 5, "03": 3}, ["0", "6", "-1", "+1", "1.0", "", "x", "٣", "9" * 5000]),
        (number(0, 1), {"0": 0.0, "1": 1.0, "1e-3": 0.001}, ["-0.1", "1.1", "nan", "inf", "x", ""]),
        (number(0, 255, is_minimum_allowed=False), {"8": 8.0, "255": 255.0}, ["0", "-0.0", "256", "nan"]),
    ],
)
def test_argument_types(kind: Callable[[str], Any], accepted: dict[str, float], refused: list[str]) -> None:
    assert {text: kind(text) for text in accepted} == accepted
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=r"is not a (whole )?number"):
            kind(text)


def test_a_whole_number_in_another_form_is_refused_with_the_form_that_is_read() -> None:
    for text, says in (("1e3", "at least 1, written in digits 0–9"), ("0", "at least 1")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a whole number of {says}$"):
            whole_number(1)(text)


def test_paths_of_options_are_expanded_and_variables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/a b") == Path("/home/me/a b") and path_or_url("~") == "/home/me"
    for kept in ("a/~/b", "a~", "./~", "s3://bucket/~me", "http://me:pa$word@host/", "cost$5", "end$", ""):
        assert path_or_url(kept) == kept
    for text, says in (
        ("$HOME/a", "$HOME, but variables are not expanded; write the value, or ~ for $HOME"),
        ("/x/${A}", "${A}, but variables are not"),
        ("a$(id)", "$(, but commands are not expanded; write the value"),
        ("r-$$", "$$, but variables are not"),
        ("s3://$B/a", "$B, but variables are not expanded; write the value"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"contains {says}")):
            local_path(text)
    for text in ("sqlite:///~/m.db", "sqlite:////~/m.db", "file:~/a", "file:///~/a", "~no-such-user/a"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"; write the (absolute|whole) path"):
            path_or_url(text)
    with pytest.raises(ValueError, match=re.escape("contains $A, but")):
        expand_home("$A/${name}", interpolates=True)


def test_every_option_for_a_file_or_folder_has_the_type_of_paths() -> None:
    sources = [path for room in ("data_prep", "launchers", "pipeline") for path in (ROOT / room).rglob("*.py")]
    assert not [str(path) for path in sources if re.search(r"\btype=(pathlib\.)?Path\b", path.read_text())]


def test_one_line_says_why_a_command_ends() -> None:
    assert error_line(64, "a: is wrong") == "ERROR[64] a: is wrong"
    line = error_line(1, "a: failed", do="repair it", rank="3", step=7, crash_file="/tmp/crash.txt")
    assert line == "ERROR[1] rank=3 step=7 a: failed; do: repair it (traceback in /tmp/crash.txt)"


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_wrong_command_line_ends_with_64_and_one_line(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command, "--bogus"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 64
    assert done.stderr.startswith("ERROR[64] ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_says_its_version(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command, "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ticketworks {__version__}\n", "")


@pytest.mark.parametrize("script", ["launchers/train.py", "launchers/evaluate.py"])
def test_help_has_an_example_for_every_way_of_starting(script: str) -> None:
    text = subprocess.check_output([sys.executable, script, "--help"], cwd=ROOT, text=True)
    examples = text.split("examples, one for each launcher:\n")[1]
    for start in ("python ", "torchrun --nproc-per-node 2 ", "deepspeed --num_gpus 2 "):
        assert f"\n  {start}{script} --" in f"\n{examples}"
    for start in ("python -m launchers.run --nproc-per-node 2 -- ", "srun "):
        assert f"\n  {start}" in examples


@pytest.mark.parametrize(
    "arguments",
    [
        *([*command, "--help"] for command in COMMANDS.values()),
        ["-m", "pipeline.tickets", "ls", "--help"],
        [*TRAIN, "--check"],
        [*TRAIN, "--print-config"],
        [*TRAIN, "--print-plan"],
        ["-m", "launchers.describe", "--model", "resnet18", "--density", "0.1"],
    ],
    ids=" ".join,
)
def test_a_reader_that_has_gone_is_no_error(arguments: list[str]) -> None:
    """As in ``COMMAND | head -0``, with a reader that has gone before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(writing)
    unexpected = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]  # of the plan
    assert (done.returncode, unexpected) == (0, [])


def test_an_error_keeps_its_code_when_nobody_reads_it() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "launchers/train.py", "--config", "bogus"]
    assert subprocess.run(command, cwd=ROOT, stdout=writing, stderr=writing).returncode == 64
    os.close(writing)


def test_every_path_of_every_command_line_is_expanded_or_refused_in_one_way() -> None:
    """``~`` is expanded and ``$NAME`` refused by the project's own argument types, in benchmarks and campaigns too."""

    def name_of(function: ast.expr) -> str:
        return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")

    found, others = 0, []
    for folder in ("launchers", "data_prep", "pipeline", "tools", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            source = path.read_text()
            for node in ast.walk(ast.parse(source)) if "argument" in source else ():
                if not isinstance(node, ast.Call) or name_of(node.func) not in ("add_argument", "add"):
                    continue
                options = {each.arg: ast.unparse(each.value) for each in node.keywords}
                kind = options.get("type", "")
                is_path = re.search(r"\b(FILE|FOLDER|PATH|DIR|OUTPUT_DIR|URI)\b", options.get("metavar", ""))
                if is_path or kind.endswith("Path"):
                    found += 1
                    others += [f"{path.name}: {ast.unparse(node)}"] * (kind not in ("local_path", "path_or_url"))
    assert others == [] and found > 40


def test_an_address_on_the_command_line_is_held_to_the_same_rule(capsys: pytest.CaptureFixture[str]) -> None:
    for uri, says in (
        ("sqlite:///~/a.db", "contains ~, which is not expanded"),
        ("http://$HOST:5000", "contains $HOST"),
    ):
        assert tracking_main(["replay", "run", "--uri", uri]) == 64
        assert f"argument --uri: {says}" in capsys.readouterr().err
