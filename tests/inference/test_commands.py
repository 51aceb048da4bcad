"""``python -m pipeline.tickets predict`` and ``bench``, and ``python -m benchmarks.inference``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import inference
from pipeline import zoo
from pipeline.inference import bench, load_ticket
from pipeline.inference.dense_engines import DenseEngine, missing
from pipeline.inference.timing import Latency, in_turns
from pipeline.tickets.__main__ import main

ENTRY = "fashion_mnist_s90"


def test_predict_prints_classes_by_name_with_probabilities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    network = load_ticket(ENTRY)
    expected = network.predict(list(pictures)).topk(2)
    names = [[network.classes[index] for index in row] for row in expected.indices.tolist()]
    assert main(["predict", ENTRY, *map(str, paths), "--top", "2"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "image"
    found = [line.removeprefix(str(paths[number // 2])).rsplit(None, 1) for number, line in enumerate(lines)]
    assert [name.strip() for name, _ in found] == [name for row in names for name in row]
    assert [probability for _, probability in found] == [f"{100 * value:.2f}" for value in expected.values.flatten()]
    assert main(["predict", str(zoo.find_ticket(ENTRY)), str(paths[0]), "--json"]) == 0
    ((row,),) = [listed["classes"] for listed in json.loads(capsys.readouterr().out)]
    assert row == {"name": names[0][0], "probability": pytest.approx(float(expected.values[0, 0]), rel=1e-5)}


def test_bench_times_what_is_installed_and_says_what_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        raise RuntimeError("cannot\nrun")

    installed = bench.dense_engines
    monkeypatch.setattr(
        bench, "dense_engines", lambda *a, **k: [*installed(*a, **k), DenseEngine("Another", "int8", broken)]
    )
    assert main(["bench", ENTRY, "--rounds", "3", "--no-compile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(row["engine"], row["precision"]): row for row in found["engines"]}
    assert {("sparse inference", "fp32"), ("torch", "fp32")} <= rows.keys()
    assert all(0 < row["latency"]["p50"] <= row["latency"]["p99"] for row in rows.values())
    assert rows["sparse inference", "fp32"]["difference"] < 1e-4
    assert found["left_out"]["Another int8"] == "cannot run"
    assert set(missing()) <= found["left_out"].keys()


def row(engine: str, precision: str, p50: float) -> bench.Row:
    return bench.Row(engine, precision, Latency(p50, 2 * p50), 1.0, 0.0)


def test_the_verdict_names_the_fastest_engine() -> None:
    rows = [row("B", "int8", 5.0), row(bench.OURS, "fp32", 10.0), row("torch", "fp32", 40.0), row("A", "fp32", 25.0)]
    assert bench.verdict(rows) == [
        "in fp32: sparse inference is 2.50 times as fast as A fp32, the fastest dense engine",
        "in other precisions: B int8 is 2.00 times as fast as sparse inference",
    ]
    assert bench.cells(rows)[1] == ["B", "int8", "5.000", "10.000", "0.50", "1.0", "0.0e+00"]
    assert bench.notes(rows, {"C": "not installed"})[2] == "left out: C: not installed"


def test_every_function_begins_in_turn_and_the_first_round_is_not_counted() -> None:
    called: list[str] = []

    def clock(leg: Callable[[], object]) -> float:
        leg()
        return float(len(called))

    legs = {name: lambda name=name: called.append(name) for name in "abc"}  # type: ignore[misc]
    assert in_turns(legs, 2, clock) == {"a": [6.0, 8.0], "b": [4.0, 9.0], "c": [5.0, 7.0]}
    assert "".join(called) == "abcbcacab"
    assert len(in_turns({"a": lambda: None}, 1000, max_seconds=0.0)["a"]) == 1
    assert Latency.of([float(number) for number in range(101)]) == Latency(50.0, 99.0)


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--quick", "--only", "I1", "I5", "--models", "cifar_resnet8", "--json", f"{tmp_path}/times.json"]
    monkeypatch.setattr("sys.argv", ["inference", *given])
    inference.main()
    written = json.loads((tmp_path / "times.json").read_text())
    assert written["I1"]["numerator_ms"] > 0 < written["I1"]["denominator_ms"]
    assert written["I1"]["bounds"]["must"] == "≥ 2.2"
    assert written["I5"]["value"] > 0
