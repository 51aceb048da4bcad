"""SET and RigL on folders of images, started with nothing configured.

What their logs show, what they record, and both side by side on MLflow's pages: as data, and in a browser.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from data_prep.doctor import FASHION_MNIST
from pipeline.tracking.place import find_run
from pipeline.tracking.ui import run_page
from tests.campaigns import small_runs
from tests.support.launch import ROOT, free_port
from tests.support.packages import needs_chromium
from tests.support.ranks import RankServer
from tests.support.terminal import screen
from tools.browser import Page, find_chromium, headless_page

METHODS = ("set_itop", "rigl_itop")
CLASSES = {"bag": 8, "sneaker": 7, "trousers": 1}  # name -> label in Fashion-MNIST
NUM_EPOCHS, STEPS_PER_EPOCH = 10, 3
TEN_EPOCHS = [
    *("plan.exploration.length=9 epochs", "plan.num_refinements=1", "plan.refinement.length=1 epochs"),
    *("evaluation.every=1 epochs", "evaluation.held_out=", "tracking.backend=mlflow"),
    *("model.num_classes=3", "data.train_samples=0", "plan.exploration.update_interval=1 steps"),
]


def make_folders(images: Path) -> None:
    """Write images of three classes as PNG files: ``images/train`` with 3 × 64 and ``images/val`` with 3 × 40."""
    for split, prefix, num in (("train", "train", 64), ("val", "t10k", 40)):
        content = [
            gzip.decompress((FASHION_MNIST / f"{prefix}-{kind}-ubyte.gz").read_bytes())
            for kind in ("images-idx3", "labels-idx1")
        ]
        pixels = np.frombuffer(content[0], np.uint8, offset=16).reshape(-1, 28, 28)
        labels = np.frombuffer(content[1], np.uint8, offset=8)
        for name, label in CLASSES.items():
            (images / split / name).mkdir(parents=True)
            for index in np.flatnonzero(labels == label)[:num]:
                Image.fromarray(pixels[index]).save(images / split / name / f"{index:05}.png")


@pytest.fixture(scope="module")
def folder(server: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both runs and their database."""
    folder = tmp_path_factory.mktemp("side-by-side")
    images = tmp_path_factory.mktemp("images")
    make_folders(images)
    data = ["data.loader=folder", *(f"data.{split}={images / split}" for split in ("train", "val"))]
    for method in METHODS:
        given = small_runs.arguments(images, folder / method, *TEN_EPOCHS, *data, every=100)
        given += [f"name={method}", f"sparsity.method={method}"]
        job = server.start(given, ranks=1, log=folder / f"{method}.log")
        assert job.wait() == [0], job.text[-3000:]
        assert f"sqlite:///{folder}/mlflow.db" in job.text.splitlines()[-1]
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_the_log_of_ten_epochs_fits_a_screen_and_has_the_accuracy_after_each(folder: Path, method: str) -> None:
    """Of 40 rows and 120 columns, with the names of folders as short as users have them."""
    text = (folder / f"{method}.log").read_text()
    shown_text = text.replace(str(folder), "/home/me/runs").strip().replace("\n", "\r\n")
    rows = screen(shown_text.encode(), columns=120)
    assert len(rows) <= 40, text
    shown = re.findall(r"epoch (\d+) of 10: top-1 (\d+\.\d\d)%, NLL \d", text)
    assert [int(epoch) for epoch, _ in shown] == list(range(1, NUM_EPOCHS + 1))
    records = [json.loads(line) for line in (folder / method / "metrics.jsonl").read_text().splitlines()]
    top1 = {each["step"]: each["metrics"]["val/top1"] for each in records if "val/top1" in each.get("metrics", {})}
    assert list(top1) == [STEPS_PER_EPOCH * epoch - 1 for epoch in range(1, NUM_EPOCHS + 1)]
    assert [f"{100 * value:.2f}" for value in top1.values()] == [value for _, value in shown]


@pytest.fixture(scope="module")
def printed(folder: Path) -> Iterator[str]:
    """The address in the line that a run prints at its end, whose command is started as printed, at a free port."""
    line = (folder / f"{METHODS[1]}.log").read_text().splitlines()[-1]
    port, page = re.fullmatch(r"MLflow +\S.* --port (\d+)  # then open http://127.0.0.1:\1(/\S+)", line).groups()  # type: ignore[union-attr]
    free = free_port()
    command = line.removeprefix("MLflow").replace(f"--port {port}", f"--port {free}")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / "ui.log").open("w") as log:
        server = subprocess.Popen(
            command, shell=True, env={**os.environ, "PATH": path}, stdout=log, stderr=log, start_new_session=True
        )
    yield f"http://127.0.0.1:{free}{page}"
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    os.killpg(server.pid, signal.SIGTERM)
    assert not psutil.wait_procs(processes, timeout=30)[1]


@pytest.fixture(scope="module")
def pages(folder: Path, printed: str) -> Iterator[dict[str, str]]:
    """The addresses that `compare` prints, while it runs; Ctrl-C must then end it and its server."""
    command = [sys.executable, "-m", "pipeline.tracking", "compare", "--no-browser"]
    output = folder / "compare.log"
    with output.open("w") as log:
        process = subprocess.Popen(
            [*command, *(str(folder / each) for each in METHODS)], cwd=ROOT, stdout=log, stderr=log
        )
    deadline = time.monotonic() + 120
    while "Ctrl-C" not in output.read_text():
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.1)
    servers = psutil.Process(process.pid).children(recursive=True)
    assert servers
    yield dict(re.findall(r"^(\w+) +(http\S+)$", output.read_text(), re.MULTILINE))
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0, output.read_text()
    assert not psutil.wait_procs(servers, timeout=10)[1]
    assert "Traceback" not in output.read_text()


def accuracies(folder: Path, method: str) -> dict[str, float]:
    """Return the top-1 that the report of a run gives, by what it is compared by."""
    rows = {row["name"]: row for row in json.loads((folder / method / "report" / "report.json").read_text())["rows"]}
    names = {"last_ticket": "ticket-1", "superposition": "superposition-mean", "ensemble": "ensemble-2"}
    return {f"eval/{name}_top1": rows[row]["top1"] for name, row in names.items()}


def ask(pages: dict[str, str], path: str, **request: Any) -> Any:
    server = pages["charts"].partition("/#/")[0]
    content = json.dumps(request).encode() if request else None
    asked = urllib.request.Request(f"{server}/api/2.0/mlflow/{path}", content, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=20) as answer:
        return json.load(answer)


def test_both_runs_are_in_one_experiment_with_all_that_describes_them(folder: Path, pages: dict[str, str]) -> None:
    runs = {method: find_run(folder / method) for method in METHODS}
    (experiment,) = {run.experiment_id for run in runs.values() if run is not None}
    found = ask(pages, "runs/search", experiment_ids=[experiment])["runs"]
    named = {run["info"]["run_name"]: run for run in found}
    assert set(METHODS) | {f"ticket-0 of {method}" for method in METHODS} <= named.keys()
    for method in METHODS:
        data = named[method]["data"]
        metrics = {each["key"]: each["value"] for each in data["metrics"]}
        assert accuracies(folder, method).items() <= metrics.items()
        assert {"val/top1", "train/loss"} <= metrics.keys()
        run_id = named[method]["info"]["run_id"]
        curve = ask(pages, f"metrics/get-history?run_id={run_id}&metric_key=val/top1")["metrics"]
        assert [point["step"] for point in curve] == [STEPS_PER_EPOCH * n - 1 for n in range(1, NUM_EPOCHS + 1)]
        tags = {each["key"]: each["value"] for each in data["tags"]}
        assert {
            "method": method,
            "model": "cifar_resnet8",
            "density": "0.1",
            "timetable": "sup_tickets",
        }.items() <= tags.items()
        assert "| ticket-1 |" in tags["mlflow.note.content"] and "--resume auto" in tags["mlflow.note.content"]
        assert tags["mlflow.source.name"].endswith(".py") and tags["mlflow.user"]
        inputs = named[method]["inputs"]["dataset_inputs"]
        assert {each["tags"][0]["value"] for each in inputs} == {"training", "evaluation"}
        assert all(re.fullmatch(r"[0-9a-f]{16}", each["dataset"]["digest"]) for each in inputs)


def assert_compared(page: Page, folder: Path) -> None:
    """The page is the table of both runs, with the accuracies that their reports give."""
    shown = page.wait_for("Comparing 2 Runs", "eval/last_ticket_top1", *METHODS)
    numbers = shown[shown.index("eval/last_ticket_top1") :].split()
    for method in METHODS:  # the page shows three decimals
        assert {f"{round(value, 3):g}" for value in accuracies(folder, method).values()} <= set(numbers)


def wait_until_served(address: str) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError), direct.open(address.partition("/#")[0], timeout=20):
            return
        assert time.monotonic() < deadline, f"no answer at {address}"
        time.sleep(0.1)


@needs_chromium
def test_a_browser_shows_accuracies_and_curves_of_both_and_what_describes_a_run(
    folder: Path, pages: dict[str, str], printed: str
) -> None:
    program = find_chromium()
    assert program is not None
    with headless_page(program) as page:
        page.resize(1900, 6000)  # charts are drawn when they come into view
        page.open(pages["charts"])
        page.wait_for("2 matching runs", *(key for key in accuracies(folder, METHODS[0])))
        page.wait_for(*(f"{method} ({key})" for method in METHODS for key in ("val/top1", "train/loss")))
        page.open(pages["table"])
        assert_compared(page, folder)
        wait_until_served(printed)
        page.open(printed)
        page.wait_for(*METHODS)
        assert page.click("[aria-label='Select all runs']", seconds=20)
        assert page.click("[data-testid='runs-compare-button']", seconds=20)
        assert_compared(page, folder)
        run = find_run(folder / METHODS[1])
        assert run is not None
        address = run_page(pages["charts"].partition("/#/")[0], run)
        page.open(address)
        page.wait_for(f"method {METHODS[1]}", "superposition-mean", "Datasets", "timetable", "sup_tickets")
        page.open(address.replace("?", "/artifacts?"))
        page.wait_for("report.html", "config.yaml", "figures")
