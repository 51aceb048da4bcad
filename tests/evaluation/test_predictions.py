"""predictions.npz: other people's tests need nothing else, and damage is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import IntegrityError
from pipeline.evaluation.predictions import Predictions, load_predictions, save_predictions

TWO = Predictions(
    ("ticket-0", "ensemble-2"),
    labels=np.array([0, 2, 1]),
    top1=np.array([[0, 2, 2], [0, 1, 1]]),
    nll=np.array([[0.1, 0.2, 3.0], [0.25, 1.5, 0.5]]),
    confidence=np.array([[0.9, 0.8, 0.7], [0.75, 0.5, 0.625]]),
)


def test_numpy_alone_reads_the_file(tmp_path: Path) -> None:
    save_predictions(TWO, tmp_path / "predictions.npz", data_digest="ab12")
    with np.load(tmp_path / "predictions.npz") as arrays:
        assert {name: arrays[name].dtype.name for name in ("labels", "top1", "nll", "confidence")} == {
            "labels": "uint16",
            "top1": "uint16",
            "nll": "float32",
            "confidence": "float32",
        }
        assert list(arrays["names"]) == ["ticket-0", "ensemble-2"] and str(arrays["data_digest"]) == "ab12"
        assert (arrays["top1"] == arrays["labels"]).mean(axis=1).tolist() == [2 / 3, 2 / 3]
    found = load_predictions(tmp_path / "predictions.npz")
    assert found.nll.mean(axis=1) == pytest.approx([1.1, 0.75]) and found.data_digest == "ab12"


def test_equal_predictions_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_predictions(TWO, tmp_path / name, data_digest="ab12")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_more_classes_than_two_bytes_hold(tmp_path: Path) -> None:
    many = Predictions(("a",), np.array([70_000]), np.array([[1]]), np.zeros((1, 1)), np.ones((1, 1)))
    save_predictions(many, tmp_path / "many", data_digest="")
    assert load_predictions(tmp_path / "many").labels.tolist() == [70_000]


def test_damage_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "predictions.npz"
    with pytest.raises(IntegrityError, match=r"predictions\.npz: does not exist"):
        load_predictions(path)
    save_predictions(TWO, path, data_digest="ab12")
    content = path.read_bytes()
    for damaged in (content[:-40], content[: len(content) // 2], b"", b"nothing", content[:90] + b"x" + content[91:]):
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="is not a file of predictions"):
            load_predictions(path)
    np.savez(path.open("wb"), names=["a"], labels=[1], top1=[[1]], nll=[[0.5]], confidence=[[1, 1]], data_digest="")
    with pytest.raises(IntegrityError, match="its arrays have different lengths"):
        load_predictions(path)
