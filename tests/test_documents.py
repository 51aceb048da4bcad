"""The documents say what is true: commands can be typed, code runs, exit codes are those of the code, README is short.

Commands that need a GPU, several hosts or data that is not here are not run: their arguments are parsed, and their
configuration is checked. Other tests run the demo's recipe, verifications of the zoo, sweeps and evaluations.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import errors
from pipeline.config.load import load_config
from pipeline.plan import build_plan
from pipeline.sparse import METHODS
from tools import api_reference, run_picture

ROOT = Path(__file__).parents[1]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "zoo/README.md", "configs/README.md", "benchmarks/README.md")
PAGES = [ROOT / name for name in OUTSIDE] + sorted((ROOT / "docs").glob("*.md")) + [ROOT / "tests/README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LAUNCHERS = ("deepspeed", "torchrun", "srun", "mpirun", "sbatch")
WITHOUT_ARGUMENTS = (  # they run at once, so that only their existence is checked
    *("tools.api_reference", "tools.configuration_reference", "tools.run_picture", "tools.recipes"),
    "tests.support.imagenet_shaped",
)
OF_OTHERS = ("pytest", "pip", "venv", "build")  # modules of Python and of packages
SHELL = (
    *("source", "pip", "fresh/bin/pip", "fresh/bin/python", "git", "npm", "mkdir", "cd", "kubectl"),
    *("mlflow", "hf", "make"),
)
STANDS_FOR = {
    "launchers/train.py": ["--config", "fashion_mnist_s90"],
    "launchers/evaluate.py": ["--tickets", "a", "--data", "b", "--output", "c"],
}


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of every command in the blocks of a page, without comments."""
    for language, block in BLOCK.findall(page.read_text()):
        if language not in ("bash", ""):
            continue
        lines = re.sub(r"\\\n\s*", " ", block)
        if language == "":  # output, mostly
            lines = "\n".join(line for line in lines.splitlines() if re.match(r"(python|deepspeed|mlflow) ", line))
        yield from split(lines)


def split(text: str) -> Iterator[list[str]]:
    """Yield commands, one a line or joined by ``&&``; a quoted text may go over several lines."""
    rest = text
    while rest.strip():
        line, _, rest = rest.lstrip().partition("\n")
        while True:
            try:
                words = shlex.split(line, comments=True)
                break
            except ValueError:  # within quotes
                more, _, rest = rest.partition("\n")
                line += "\n" + more
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def of_the_project(words: list[str]) -> Iterator[list[str]]:
    """Yield what the project itself is asked to read: ``-m MODULE …`` or a script with its arguments."""
    words = [word for word in words if not re.fullmatch(r"[A-Z]+=\S*", word)]
    if "…" in words:  # a command that stood before: only its new arguments are read
        index = words.index("…") - (words[words.index("…") - 1] == "--config")
        words[index : words.index("…") + 1] = STANDS_FOR[next(word for word in words if word in STANDS_FOR)]
    if words[0] in LAUNCHERS:
        start = next(index for index, word in enumerate(words) if word.startswith("launchers/") or word == "-m")
        is_array = any(word.startswith("--array=") for word in words[:start])
        words = words[start:]
        if words[0].endswith(".sbatch"):
            words = [f"launchers/{'sweep' if is_array else 'train'}.py", *words[1:]]
    elif words[0] in ("python", ".venv/bin/python"):
        words = words[1:]
    else:
        return
    yield words
    if words[0] == "-m" and "--" in words:
        yield words[words.index("--") + 1 :]


def all_commands() -> list[tuple[str, list[str]]]:
    return [(page.name, words) for page in PAGES for words in commands(page)]


def test_every_command_can_be_typed() -> None:
    """Scripts and modules exist, options and configuration keys too; every other program is known."""
    makefile = (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found: list[tuple[str, list[str]]] = []
    for page, words in all_commands():
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), (page, words)
        for extra in re.findall(r"^\.?\[(\w+)\]$", words[-1]) if "install" in words else ():
            assert extra in extras, (page, words)
        mine = list(of_the_project(words))
        assert mine or words[0] in SHELL, (page, words)
        for each in mine:
            if each[0] == "-c":
                ast.parse(each[1])
            elif each[0] == "-m" and each[1] in (*WITHOUT_ARGUMENTS, *OF_OTHERS):
                assert each[1] in OF_OTHERS or importlib.util.find_spec(each[1]), (page, words)
            elif each not in [one for _, one in found]:
                found.append((page, each))
    assert len(found) > 60
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.parse_commands"],
        input=json.dumps([words for _, words in found]), capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    faults = json.loads(done.stdout.splitlines()[-1])
    assert [(page, words, fault) for (page, words), fault in zip(found, faults, strict=True) if fault] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_code_compiles_and_imports_what_exists(page: Path) -> None:
    for language, block in BLOCK.findall(page.read_text()):
        if language != "python" or page.name == "api.md" or block.startswith(" "):  # a line of a class in CONTRIBUTING
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("pipeline", "data_prep"):
                module = importlib.import_module(str(node.module))
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def test_configurations_of_the_papers_are_valid(tmp_path: Path) -> None:
    blocks = [block for language, block in BLOCK.findall((ROOT / "docs/papers.md").read_text()) if language == "yaml"]
    num_tickets = []
    for block in blocks:
        (tmp_path / "paper.yaml").write_text(f"base: {ROOT}/configs/cifar10_itop.yaml\nname: paper\n{block}")
        config = load_config(str(tmp_path / "paper.yaml"), ["data.train=a", "data.val=b"])
        plan = build_plan(config, steps_per_epoch=391)
        num_tickets.append(sum(phase.ticket_index is not None for phase in plan.phases))
    assert num_tickets == [1, 3, 5]


def test_the_code_of_the_readme_and_quick_start_runs(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(tmp_path / "boot.png")
    for name in ("README.md", "docs/quick-start.md"):
        (code,) = (block for language, block in BLOCK.findall((ROOT / name).read_text()) if language == "python")
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 0, done.stderr
        (named,) = ast.literal_eval(done.stdout.splitlines()[-1])
        assert len(named) == 3
        assert sum(share for _, share in named) <= 1


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100
    assert [line for line in lines if len(line) > 100] == []


def test_the_result_in_the_readme_is_that_of_the_study() -> None:
    ((mean, low, high),) = re.findall(r"by ([\d.]+) points \[([\d.]+), ([\d.]+)\]", (ROOT / "README.md").read_text())
    assert (
        f"beats the best cheap ticket | top-1 % | +{mean} [+{low}, +{high}] | reproduced"
        in (ROOT / "docs/papers.md").read_text()
    )


def test_every_exit_code_has_a_row_and_no_other() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    rows = [int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)]
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.RunError)]
    assert rows == [0, *sorted({each.code for each in classes})]


def test_generated_pages_are_current() -> None:
    assert api_reference.PAGE.read_text() == api_reference.markdown(), "run python -m tools.api_reference"
    assert run_picture.PICTURE.read_text() == run_picture.svg(), "run python -m tools.run_picture"


def test_every_method_says_when_to_choose_it() -> None:
    table = (ROOT / "docs/methods.md").read_text().split("| choose it |\n")[1].split("\n\n")[0]
    firsts = [line.split("|")[1] for line in table.splitlines()[1:]]
    assert [name for first in firsts for name in re.findall(r"`(\w+)`", first)] == list(METHODS)


def test_every_exported_name_is_in_the_reference() -> None:
    page = api_reference.PAGE.read_text()
    for package in api_reference.PACKAGES:
        section = page.split(f"\n## {package}\n")[1].split("\n## ")[0]
        exported = sorted(importlib.import_module(package).__all__, key=str.lower)
        assert re.findall(r"^### (\w+)$", section, re.MULTILINE) == exported


def test_the_commands_of_quick_start_run_on_images_of_ones_own(tmp_path: Path) -> None:
    """What trains is only checked: the configuration, the plan and the data; it takes minutes."""
    for folder in ("train/bag", "train/shoe", "val/bag", "val/shoe"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (32, 32), (60 * index, 9, 9)).save(tmp_path / "photos" / folder / f"{index}.png")
    for words in commands(ROOT / "docs/quick-start.md"):
        mine = next(of_the_project(words), [])
        if "photos" not in " ".join(mine) or words[0] != "python":
            continue
        if mine[0] == "launchers/train.py":
            mine = [
                str(ROOT / mine[0]),
                *mine[1:],
                "--check",
                "train.global_batch=4",
                "evaluation.recalibration_batch=4",
            ]
        done = subprocess.run(
            [sys.executable, *mine], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "data/photos").iterdir()) == [
        *("train.beton", "train.beton.json", "val.beton", "val.beton.json"),
    ]


def test_cheap_commands_run(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "boot.png")
    expected = {"predict": "%", "--print-plan": "refinement-1"}
    for what, shown in expected.items():
        words = next(words for page, words in all_commands() if what in words and page == "quick-start.md")
        (mine,) = of_the_project(words)
        script = [str(ROOT / word) if word.startswith("launchers/") else word for word in mine]
        done = subprocess.run(
            [sys.executable, *script], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout
