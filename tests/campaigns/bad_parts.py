"""24 bad parts of one's own, starting points and networks of other projects."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tests.campaigns.bad_saved import joined, parts
from tests.campaigns.cases import CONFIG, DATA, Case, Good

Make = Callable[[Good, Path], list[str]]
PACKAGE = "NUMBER = 3\n\n\ndef build(num_classes):\n    raise RuntimeError('no network today')\n"
MODULES = {"good_part": PACKAGE, "broken_part": "1 / 0\n", "needing_part": "import no_such_library\n"}
MODEL = ("model.args={}", "imports=[good_part]")
# Each says what is wrong before or after torch is loaded; with imports it is loaded for the tables of choices.
QUICK = (
    ("imports=[no_such_part]", "imports: no_such_part is not installed; do: install it"),
    ("imports=good_part", "imports: expected a list, got 'good_part'; write [good_part]"),
    ("imports=['../part']", "imports: '../part' is not the name of a module"),
    ("imports=[needing_part]", "imports: needing_part needs no_such_library; do: install it"),
    ("imports=[broken_part]", "imports: broken_part cannot be imported: ZeroDivisionError: division by zero"),
    ("model.name=os:system", "'os:system' is code of a package; add 'os' to imports"),
    ("model.new_head=true", "model.new_head: needs model.from_ticket or model.from_state; remove it"),
    ("sparsity.initial=snap", "sparsity.initial: 'snap' is not one of random, magnitude, snip, grasp, synflow; did"),
    ("sparsity.density_schedule=quadratic", "sparsity.density_schedule: 'quadratic' is not one of cubic, alternating"),
    ("sparsity.method=snip", "needs a method that changes masks, but sparsity.method 'snip' does not"),
    ("sparsity.method=gmp", "needs a method that grows weights, but sparsity.method 'gmp' only prunes"),
)
SLOW = (
    ((*MODEL, "model.name=good_part:nothing"), "model.name: 'good_part:nothing'"),
    ((*MODEL, "model.name=good_part:NUMBER"), "'good_part:NUMBER' is not a function or class"),
    ((*MODEL, "sparsity.grow=gradeint"), "did you mean 'gradient'?"),
)


def _train(*texts: str) -> Make:
    def make(good: Good, folder: Path) -> list[str]:
        for name, text in MODULES.items():
            (folder / f"{name}.py").write_text(text)
        return ["env", f"PYTHONPATH={folder}", *good.train(*texts)]

    return make


def _from(key: str, write: Callable[[Good, Path], object]) -> Make:
    """Start a run from a file that ``write`` makes."""

    def make(good: Good, folder: Path) -> list[str]:
        write(good, folder / "file.safetensors")
        return good.train(f"model.{key}={folder}/file.safetensors")

    return make


def _code(good: Good, path: Path) -> None:
    import torch

    torch.save({"fc.weight": Path("/")}, path)


def _copy(good: Good, path: Path) -> None:
    path.write_bytes(good.ticket)


def _state(**tensors: list[list[float]]) -> Callable[[Good, Path], None]:
    def write(good: Good, path: Path) -> None:
        import torch
        from safetensors.torch import save_file

        save_file({name.replace("__", "."): torch.tensor(rows) for name, rows in tensors.items()}, path)

    return write


def _dense(good: Good, path: Path) -> None:
    from safetensors.torch import save_file

    from pipeline import models

    save_file(models.build("cifar_resnet8", num_classes=3).state_dict(), path)


def _import(write: Callable[[Good, Path], object], *more: str) -> Make:
    def make(good: Good, folder: Path) -> list[str]:
        write(good, folder / "file.safetensors")
        command = [sys.executable, "-m", "pipeline.tickets", "import", str(folder / "file.safetensors")]
        return [*command, "--model", "cifar_resnet8", "--output", str(folder / "ticket.safetensors"), *more]

    return make


def _ticket(*more: str) -> Make:
    """Evaluate a ticket whose network is code of a package that it names."""

    def make(good: Good, folder: Path) -> list[str]:
        entries, header, body = parts(good.ticket)
        header["provenance"] |= {"model": "hostile_part:build"}
        header["provenance"]["origin"] = {"imports": {"hostile_part": "1.0"}}
        header["minor"] = 1
        (folder / "tickets").mkdir()
        (folder / "tickets" / "ticket-000.safetensors").write_bytes(joined(entries, header, body))
        return good.evaluate(folder / "tickets", *more)

    return make


HALF = [[0.0, 1.0], [2.0, 0.0]]
FILES: tuple[tuple[str, int, str, Make], ...] = (
    ("from_ticket: nothing there", DATA, "does not exist; do: check the path", _from("from_ticket", lambda *_: None)),
    (
        "from_ticket: of another network",
        DATA,
        "does not fit cifar_resnet8: stem.weight is of shape",
        _from("from_ticket", _copy),
    ),
    ("from_state: nothing there", DATA, "does not exist; do: check the path", _from("from_state", lambda *_: None)),
    ("from_state: a ticket", CONFIG, "is a ticket; do: set model.from_ticket=", _from("from_state", _copy)),
    (
        "from_state: code",
        DATA,
        "cannot be read without running code that it names: pathlib.PosixPath; do: save only model.state_dict()",
        _from("from_state", _code),
    ),
    (
        "import: an unknown layout",
        CONFIG,
        "--layout: 'rigel' is not a layout",
        _import(_state(a__weight=HALF), "--layout", "rigel"),
    ),
    ("import: a dense network", DATA, "no weight is 0 and there are no masks", _import(_dense, "--num-classes", "3")),
    (
        "import: another network",
        DATA,
        "a.weight is missing in the network, but of shape [2, 2] in the file",
        _import(_state(a__weight=HALF)),
    ),
    ("a ticket that needs a package", CONFIG, "needs hostile_part, which a file cannot load", _ticket()),
    (
        "a package that is not there",
        CONFIG,
        "no_such_part is not installed; do: install it",
        _ticket("--imports", "no_such_part"),
    ),
)
LOAD_TORCH = {name for name, *_ in FILES if not name.startswith("a ")} | {" ".join(texts) for texts, _ in SLOW}

CASES = [
    *(Case("part", text, CONFIG, says, _train(text)) for text, says in QUICK),
    *(Case("part", " ".join(texts), CONFIG, says, _train(*texts)) for texts, says in SLOW),
    *(Case("part", name, code, says, make) for name, code, says, make in FILES),
]
