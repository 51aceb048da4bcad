"""The import rules: one door per outside library, pure mathematics, light modules stay light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline

ROOT = Path(__file__).parents[1]
SOURCES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for folder in ("pipeline", "launchers", "data_prep", "tools", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
DOORS = {
    "deepspeed": ("pipeline/engine/", "benchmarks/support/gradients_worker.py"),
    "ffcv": (
        "pipeline/data/",
        "pipeline/datasets/",
        "data_prep/",
        "benchmarks/support/bare_ffcv.py",
        "benchmarks/writing.py",
    ),
    "mlflow": ("pipeline/tracking/",),
    "omegaconf": ("pipeline/config/",),
    "matplotlib": ("pipeline/evaluation/figure.py",),
    "timm": ("pipeline/models/",),
    "fsspec": ("pipeline/tickets/remote.py",),
    "huggingface_hub": ("pipeline/tickets/hub.py",),
    "llvmlite": ("pipeline/inference/", "pipeline/data/decoder.py"),
    "onnxruntime": ("pipeline/inference/dense_engines.py",),
    "openvino": ("pipeline/inference/dense_engines.py",),
}
# The house, bottom to top: a room imports from its own files and from the floors below, never from
# its own floor or above.
FLOORS = (
    ("lazy", "limits", "memory", "moved", "numbers", "redaction", "schedules", "terminal"),
    ("errors",),
    ("files", "command_line", "parts"),
    ("chain", "distributed", "models", "zoo"),
    ("sparse",),
    ("superposition", "tickets"),
    ("config",),
    ("engine", "datasets", "tracking"),
    ("plan",),
    ("data", "checkpoint"),
    ("inference",),
    ("evaluation",),
    ("training",),
    ("verification",),
)
# Two commands about tickets, predict and bench, run them: the command line of a room may reach higher than the room.
COMMANDS = {"pipeline/tickets/run_cli.py": {"inference"}}
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
PURE = (
    "pipeline/schedules.py",
    "pipeline/plan.py",
    *(
        f"pipeline/sparse/{name}.py"
        for name in (
            "distribution",
            "criteria",
            "update",
            "select",
            "at_once",
            "exploration",
            "flops",
            "structure",
            "timing",
        )
    ),
    "pipeline/evaluation/metrics.py",
    "pipeline/evaluation/paired.py",
    "pipeline/superposition/",
)
PURE_MAY_IMPORT = {"torch", "numpy", "pipeline", "numba"} | sys.stdlib_module_names

ABOVE = ("launchers", "data_prep", "tools", "benchmarks", "tests")

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "yaml.load",
    "yaml.load_all",
    "os.system",
    "os.popen",
    "tempfile.mktemp",
}
UNSAFE_METHODS = {"unsafe_load", "full_load", "read_pickle", "extractall"}


UNPICKLER = "data_prep/cifar_pickle.py"


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def test_the_code_under_test_is_this_checkout() -> None:
    assert Path(pipeline.__file__).resolve().is_relative_to(ROOT)


@pytest.mark.parametrize("library", sorted(DOORS))
def test_each_library_is_behind_its_door(library: str) -> None:
    users = [name for name, tree in SOURCES.items() if any(i.split(".")[0] == library for i in imports(tree))]
    assert users, library
    assert [name for name in users if not name.startswith(DOORS[library])] == []


@pytest.mark.parametrize("place", PURE)
def test_the_mathematics_is_pure(place: str) -> None:
    inside = [name for name in SOURCES if name.startswith(place)]
    assert inside, place
    for name in inside:
        assert {i.split(".")[0] for i in imports(SOURCES[name])} <= PURE_MAY_IMPORT, name
        assert not any(i.startswith("pipeline.distributed") for i in imports(SOURCES[name])), name


def test_no_import_runs_upwards() -> None:
    rooms = {
        Path(name).relative_to("pipeline").parts[0].removesuffix(".py")
        for name in SOURCES
        if name.startswith("pipeline/")
    }
    assert rooms - {"__init__"} == set(FLOOR_OF)
    upwards = [
        f"{name} imports pipeline.{room}"
        for name, here in (
            (n, Path(n).relative_to("pipeline").parts[0].removesuffix(".py"))
            for n in SOURCES
            if n.startswith("pipeline/")
        )
        for room in {i.split(".")[1] for i in imports(SOURCES[name]) if i.startswith("pipeline.")} & set(FLOOR_OF)
        if here in FLOOR_OF and room != here and FLOOR_OF[room] >= FLOOR_OF[here]
        if room not in COMMANDS.get(name, ())
    ]
    assert upwards == []
    outside = {
        name
        for name in SOURCES
        if name.startswith("pipeline/") and {i.split(".")[0] for i in imports(SOURCES[name])} & set(ABOVE)
    }
    assert outside == set()


def test_contributing_lists_every_room_on_its_floor() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().split("\n### The floors of ")[1].split("\n### ")[0]
    listed = [re.findall(r"^ +- `(\w+)`:", floor, re.MULTILINE) for floor in re.split(r"(?m)^\d+\. ", text)[1:]]
    assert [set(rooms) for rooms in listed] == [set(rooms) for rooms in FLOORS]


def test_no_files_import_each_other() -> None:
    """There is no circle of two or more files, wherever in a file an import stands."""
    of_module = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in SOURCES}
    below = {
        name: {of_module[i] for i in imports(tree) if i in of_module} - {name}
        for name, tree in SOURCES.items()
        if "__init__" not in name
    }
    while leaves := [name for name in below if not below[name] & set(below)]:
        for name in leaves:
            del below[name]
    assert sorted(below) == []


def unsafe(tree: ast.AST) -> list[str]:
    """List calls that run code from a file or a string, or follow a path that a file names."""
    found = [f"import {name}" for name in imports(tree) if name.split(".")[0] in UNSAFE_MODULES]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in UNSAFE_CALLS or called.rpartition(".")[2] in UNSAFE_METHODS:
            found.append(called)
        if called == "torch.load" and options.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if options.get("allow_pickle", "False") != "False" or options.get("shell", "False") != "False":
            found.append(f"{called} with allow_pickle or shell")
        if called.startswith("yaml.") and options.get("Loader", "SafeLoader").rpartition(".")[2] not in (
            "SafeLoader",
            "_Loader",
        ):
            found.append(f"{called} with {options['Loader']}")
    return found


def test_nothing_unsafe_is_used() -> None:
    found = {name: unsafe(tree) for name, tree in SOURCES.items() if unsafe(tree)}
    assert found == {UNPICKLER: ["import pickle"]}


@pytest.mark.parametrize(
    "code",
    [
        *(
            "import pickle",
            "from pickle import loads",
            "import torch, dill",
            "eval(text)",
            "exec(text)",
            "os.system(text)",
            "yaml.load(text)",
        ),
        *(
            "yaml.compose(text, Loader=yaml.Loader)",
            "yaml.unsafe_load(text)",
            "torch.load(file)",
            "torch.load(file, weights_only=False)",
        ),
        *(
            "np.load(file, allow_pickle=True)",
            "np.load(file, allow_pickle=given)",
            "subprocess.run(text, shell=True)",
            "tar.extractall(folder)",
        ),
        *(
            "from numpy.lib import format; format.read_array(f, allow_pickle=1)",
            "pd.read_pickle(file)",
            "tempfile.mktemp()",
        ),
    ],
)
def test_unsafe_code_is_found(code: str) -> None:
    assert unsafe(ast.parse(code))


def test_what_is_read_from_files_goes_through_one_parser() -> None:
    """One place refuses JSON with duplicate names, NaN or numbers of any length.

    Exempt is what does not come from files: messages between ranks, and arguments. metrics.jsonl is
    read line by line, and a line that is not JSON is skipped.
    """
    readers = [
        name
        for name, tree in SOURCES.items()
        if any(ast.unparse(n.func) == "json.loads" for n in ast.walk(tree) if isinstance(n, ast.Call))
    ]
    own = (
        "pipeline/files.py",
        "pipeline/distributed/",
        "launchers/describe.py",
        "pipeline/tracking/journal.py",
        "benchmarks/",
        "tools/",
    )
    assert [name for name in readers if not name.startswith(own)] == []


def test_the_one_unpickler_finds_no_name_but_its_own() -> None:
    """CIFAR's Python version is read by a subclass that looks up no name.

    Neither pickle's functions nor its own lookup are used.
    """
    used = {ast.unparse(node) for node in ast.walk(SOURCES[UNPICKLER]) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith("pickle.")} == {"pickle.Unpickler", "pickle.UnpicklingError"}
    assert not any("super()" in name for name in used)
    (unpickler,) = (
        node for node in ast.walk(SOURCES[UNPICKLER]) if isinstance(node, ast.ClassDef) and node.name == "_Restricted"
    )
    assert {node.name for node in unpickler.body if isinstance(node, ast.FunctionDef)} == {
        "find_class",
        "persistent_load",
    }


@pytest.mark.parametrize(
    "module", ["pipeline.sparse.sparsifier", "pipeline.tickets.format", "pipeline.evaluation.metrics"]
)
def test_light_modules_import_torch_and_numpy_only(module: str) -> None:
    heavy = "'deepspeed', 'ffcv', 'mlflow', 'torchvision', 'timm', 'omegaconf', 'matplotlib', 'pandas', 'cv2'"
    code = (
        f"import sys, {module}; sys.exit(str({{{heavy}}} & set(sys.modules)) if {{{heavy}}} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_what_is_checked_first_is_checked_without_torch() -> None:
    """Then a mistake in configuration, data, tickets or a checkpoint is reported within a second."""
    modules = "launchers.train_cli, data_prep.__main__, pipeline.datasets.sets, pipeline.datasets.stage"
    modules += ", pipeline.evaluation.inputs"
    modules += ", pipeline.checkpoint.verify"
    modules += ", launchers.sweep_output, launchers.sweep_cli, launchers.sweep_jobs"  # a sweep waits for days
    code = (
        f"import sys, {modules}; print({{'torch', 'ffcv', 'deepspeed', 'mlflow', 'numba', 'cv2'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"


def test_the_story_fits_one_screen() -> None:
    tree = SOURCES["launchers/train.py"]
    (story,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert story.end_lineno is not None
    assert story.end_lineno - story.lineno < 55
