"""What users import: light, typed, with a version, and the module paths of version 0.1 until 0.3."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pipeline
from pipeline.moved import MOVED

ROOT = Path(__file__).parents[1]
FACES = ("pipeline.sparse", "pipeline.tickets", "pipeline.evaluation", "pipeline.models", "pipeline.inference")
HEAVY = ("deepspeed", "ffcv", "mlflow", "torchvision", "timm", "omegaconf", "matplotlib", "psutil", "numba")

USER_CODE = """
from pipeline.evaluation import top1
from pipeline.sparse import METHODS, Sparsifier, Strategy
from pipeline.tickets import Ticket, decode

strategy: Strategy = METHODS["rigl"]
ticket: Ticket = decode("ticket.safetensors")
"""
WRONG_CODE = """
from pipeline.sparse import METHODS, Sparsifier
from pipeline.tickets import decode

METHODS["rigl"].drop_fractoin
Sparsifier(1, 2)
decode(density=0.1)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("face", FACES)
def test_every_exported_name_can_be_imported_and_types_agree(face: str) -> None:
    package = importlib.import_module(face)
    shown = set(
        re.findall(r"\w+", Path(str(package.__file__)).read_text().split("TYPE_CHECKING:")[1].split("__all__")[0])
    )
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in shown, f"{name} has no type for a type checker"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


def test_methods_need_no_torch_and_nothing_exported_needs_the_pipelines_libraries() -> None:
    first = "import sys; from pipeline.sparse import METHODS, Strategy, method, timetable; timetable('rigl', 9); "
    first += "print('torch' in sys.modules)"
    rest = f"""
for face in {FACES[:3]}:
    package = __import__(face, fromlist=["x"])
    [getattr(package, name) for name in package.__all__]
print(sorted(set({HEAVY}) & set(sys.modules)))"""
    done = python(first + rest)
    assert (done.returncode, done.stdout) == (0, "False\n[]\n"), done.stderr


def test_the_version_has_one_source_that_a_plain_checkout_has() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    source = (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text()
    assert re.findall(r'^__version__ = "(.*?)"', source, re.MULTILINE) == [pipeline.__version__]
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import pipeline; print(pipeline.__version__)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == pipeline.__version__


def test_a_users_type_checker_sees_types(tmp_path: Path) -> None:
    assert (ROOT / "pipeline/py.typed").is_file()
    (tmp_path / "good.py").write_text(USER_CODE)
    (tmp_path / "wrong.py").write_text(WRONG_CODE)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--cache-dir",
        str(ROOT / ".mypy_cache"),
    ]
    command += ["--config-file", str(ROOT / "pyproject.toml")]
    good, wrong = (
        subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True, cwd=ROOT)
        for name in ("good.py", "wrong.py")
    )
    assert good.returncode == 0, good.stdout + good.stderr
    for message in (
        '"Strategy" has no attribute "drop_fractoin"',
        'Argument 1 to "Sparsifier" has incompatible type "int"',
    ):
        assert message in wrong.stdout
    assert 'Unexpected keyword argument "density" for "decode"' in wrong.stdout


def test_old_module_paths_import_with_a_warning() -> None:
    code = f"""
import importlib, json, sys, warnings
seen = {{}}
for old, new in {MOVED!r}.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(old)
    warned = [w for w in caught if w.category is FutureWarning and old in str(w.message) and new in str(w.message)]
    seen[old] = [len(warned), module is importlib.import_module(new), module.__name__]
print(json.dumps(seen))"""
    done = subprocess.run(
        [sys.executable, "-c", "import launchers" + code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {old: [1, True, new] for old, new in MOVED.items()}


@pytest.mark.parametrize("old", ["launchers.cli", "pipeline.tickets.reading"])
def test_an_old_path_is_the_first_import_of_a_script(old: str) -> None:
    done = python(f"import {old}")
    assert done.returncode == 0, done.stderr
    assert f"FutureWarning: {old} has moved to {MOVED[old]}; the old path works until version 0.3" in done.stderr


def test_the_paths_that_stay_do_not_warn() -> None:
    code = "import pipeline.sparse.sparsifier, pipeline.sparse.strategy, pipeline.tickets.format; "
    code += "import pipeline.evaluation.metrics"
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_every_move_is_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert [old for old, new in MOVED.items() if f"| `{old}` | `{new}` |" not in changelog] == []


def test_the_old_describe_command_names_the_new_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.sparse.describe", "--model", "resnet50"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr == "ERROR[64] python -m pipeline.sparse.describe has moved; do: python -m launchers.describe\n"
