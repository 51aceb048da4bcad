"""Make the screenshots in docs/images: a SET and a RigL run on Fashion-MNIST, side by side on MLflow's pages.

Usage::

    python -m data_prep fashion-mnist --output data/fashion_mnist
    python -m tools.screenshots                           # trains both runs first, for minutes on two cores
    python -m tools.screenshots --runs runs/set runs/rigl  # shows two runs that are there already

It needs Chromium (``apt-get install chromium``). Look at the pictures before you commit them.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.command_line import ArgumentParser, local_path, run_to_end
from pipeline.errors import ConfigError, ServiceError
from tools.browser import APT_LINE, Page, find_chromium, headless_page

ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = 200_000  # of each picture in the repository
WIDTH, HEIGHT = 1680, 780
CHARTS_HEIGHT = 1880  # bars, and below them curves
SHORT = (
    "model.args={width: 16, stem_stride: 2}",
    *("plan.exploration.length=3 epochs", "plan.refinement.length=1 epochs", "plan.num_refinements=3"),
    *("evaluation.every=234 steps", "tracking.log_every_steps=58", "tracking.system_every_seconds=5"),
)
# MLflow's assistant takes a third of the page; its bars and charts have a toolbar that a mouse would show
_TIDY = """
for (const each of document.querySelectorAll('.modebar-container, .modebar')) each.style.display = 'none';
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the screenshots and return the exit code."""
    parser = ArgumentParser(prog="python -m tools.screenshots", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=local_path, nargs=2, metavar="RUN", help="folders of a SET and a RigL run")
    parser.add_argument(
        "--data", type=local_path, default=ROOT / "data" / "fashion_mnist", help="folder of the .beton files"
    )
    parser.add_argument(
        "--output", type=local_path, default=ROOT / "docs" / "images", help="where the pictures are written"
    )

    def run() -> int:
        given = parser.parse_args(arguments)
        program = find_chromium()
        if program is None:
            raise ServiceError("Chromium is not installed", do=APT_LINE)
        with tempfile.TemporaryDirectory() as folder:
            runs = given.runs or _train(given, Path(folder))
            with _pages("compare", runs) as compared, headless_page(program, width=WIDTH, height=HEIGHT) as page:
                _load(page, compared["charts"], "eval/ensemble_nll", height=CHARTS_HEIGHT)
                page.type("input[placeholder='Search metric charts']", "top1")
                page.wait_for("val/top1", "eval/superposition_top1")
                _take(page, given.output / "mlflow-compare.png")
            with _pages("open", runs[1:]) as opened, headless_page(program, width=WIDTH, height=HEIGHT) as page:
                (address,) = opened.values()
                _load(page, address, "superposition-mean")
                _take(page, given.output / "mlflow.png")
        return 0

    return run_to_end(run)


def _train(given: argparse.Namespace, folder: Path) -> list[Path]:
    if not (given.data / "train.beton").is_file():
        raise ConfigError(
            f"{given.data}: has no train.beton", do=f"python -m data_prep fashion-mnist --output {given.data}"
        )
    runs = []
    for method in ("set", "rigl"):
        runs.append(folder / method)
        files = [f"data.train={given.data / 'train.beton'}", f"data.val={given.data / 'val.beton'}"]
        named = [f"name=fashion_mnist_{method}", f"output_dir={runs[-1]}", f"sparsity.method={method}_itop"]
        command = [sys.executable, "launchers/train.py", "--config", "fashion_mnist_s90", *SHORT, *files, *named]
        subprocess.run(command, cwd=ROOT, check=True)
    return runs


@contextlib.contextmanager
def _pages(command: str, runs: Sequence[Path]) -> Iterator[dict[str, str]]:
    """Run ``python -m pipeline.tracking`` and yield the addresses that it prints, by their names."""
    line = [sys.executable, "-m", "pipeline.tracking", command, "--no-browser", *map(str, runs)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found: dict[str, str] = {}
        for said in process.stdout:
            if address := re.fullmatch(r"(\S+) +(http\S+)\n", said):
                found[address[1]] = address[2]
            if said.startswith("Ctrl-C"):
                break
        try:
            yield found
        finally:
            process.send_signal(signal.SIGINT)


def _load(page: Page, address: str, text: str, *, height: int = HEIGHT) -> None:
    """Open a page and wait until it shows ``text``."""
    page.resize(WIDTH, height)
    page.open(address)
    page.wait_for("MLflow Assistant", text)
    page.click("[aria-label='Close']")  # the assistant, which takes a third of the page


def _take(page: Page, path: Path) -> None:
    """Write the picture of a page."""
    time.sleep(3)  # charts are drawn for the new size, and fade in
    page.evaluate(_TIDY)
    page.screenshot(path)
    size = path.stat().st_size
    print(f"{path}: {size:,} bytes" + (f", more than {MAX_BYTES:,}" if size > MAX_BYTES else ""))


if __name__ == "__main__":
    sys.exit(main())
