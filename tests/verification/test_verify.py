"""What is found without running anything, what only a segment that is run again shows, and how segments are drawn."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launchers import verify as command
from pipeline.chain import canonical, link_of, read_chain
from pipeline.config.load import load_config
from pipeline.errors import ConfigError, DataError, IntegrityError
from pipeline.verification.claims import read_claims
from pipeline.verification.segments import Segment, draw, segments_of
from pipeline.verification.tolerance import accuracy_bound, loss_bound, outside, top1_of
from pipeline.verification.verdict import verify
from tests.campaigns.tampering import KINDS, OF_BUNDLE, sign, tamperings

STORED = Path(__file__).parents[1] / "fixtures" / "version_0_1" / "run"


def test_three_tamperings_of_each_kind_are_found_without_running_anything(
    run: Path, bundle: Path, tmp_path: Path
) -> None:
    kinds = len(KINDS) + len(OF_BUNDLE)
    assert kinds == 34
    missed, counts = tamperings(run, bundle, tmp_path, num=3 * kinds, seed=1)
    assert missed == []
    assert set(counts.values()) == {3}


def forged(run: Path, target: Path, *, step: int) -> Path:
    """Claim a lower loss at run step ``step``, and make everything agree: log, links, and checkpoints."""
    shutil.copytree(run, target)
    records, links, link = read_chain(run / "chain.jsonl"), {}, ""
    for record in records:
        if str(step) in record.get("metrics", {}) and "train/loss" in record["metrics"][str(step)]:
            record["metrics"][str(step)]["train/loss"] -= 0.25
        old = record["link"]
        link = links[old] = record["link"] = link_of(link, record)
    (target / "chain.jsonl").write_text("".join(canonical(record) + "\n" for record in records))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in lines:
        if record.get("step") == step and "train/loss" in record["metrics"]:
            record["metrics"]["train/loss"] -= 0.25
    (target / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    for folder in (target / "checkpoints").glob("step-*"):
        state = json.loads((folder / "state.json").read_text())
        state["chain"]["link"] = links[state["chain"]["link"]]
        for at, values in state["chain"]["pending"].items():
            if int(at) == step and "train/loss" in values:
                values["train/loss"] -= 0.25
        (folder / "state.json").write_text(json.dumps(state, indent=1))
        sign(folder)
    return target


def seed_of(claims: Any, start: int) -> int:
    """Return the first seed that draws the segment that starts there."""
    segments, link = segments_of(claims), claims.records[-1]["link"]
    return next(seed for seed in range(1000) if draw(segments, 1, seed=seed, link=link)[0].start == start)


@pytest.mark.slow
def test_a_consistently_forged_chain_is_found_when_its_segment_is_drawn(run: Path, tmp_path: Path) -> None:
    target = forged(run, tmp_path / "forged", step=5)  # of steps 4–8
    assert verify(str(target), num_segments=0, seed=0).startswith("CONSISTENT ")
    claims = read_claims(target, "forged")
    assert [segment.name for segment in segments_of(claims)] == [
        *("steps 0–4", "steps 4–8", "steps 8–12", "steps 12–14"),
    ]
    loss = next(record["metrics"]["5"] for record in claims.records if record["step"] == 6)["train/loss"]
    with pytest.raises(IntegrityError) as caught:
        verify(str(target), num_segments=1, seed=seed_of(claims, 4))
    expected = f"steps 4–8, run again: the report of step 6 differs: metrics: 5: train/loss: claimed {loss}, found "
    assert expected in str(caught.value)
    assert "do not trust this run" in str(caught.value)


@pytest.mark.slow
def test_the_last_segment_with_its_report_has_equal_bits(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, from the run's own folder; tests/end_to_end has a bundle of two ranks."""
    seed = seed_of(read_claims(run, "run"), 12)
    assert command.main([str(run), "--seed", str(seed)]) == 0
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith(f"VERIFIED {run}: 1 of 4 segments run again (seed {seed}, steps 12–14) with equal bits; ")


def test_every_segment_has_the_same_chance(run: Path) -> None:
    segments = segments_of(read_claims(run, "run"))
    single = Counter(draw(segments, 1, seed=seed, link="a")[0].start for seed in range(4000))
    assert all(abs(single[start] - 1000) < 5 * math.sqrt(4000 * 0.25 * 0.75) for start in (0, 4, 8, 12))
    hits = sum(any(segment.start == 4 for segment in draw(segments, 2, seed=s, link="a")) for s in range(4000))
    assert abs(hits - 2000) < 5 * math.sqrt(4000 * 0.25)  # two of four segments: 1/2, which is more than 1 - (3/4)²
    assert draw(segments, 9, seed=0, link="a") == segments
    assert len({draw(segments, 1, seed=0, link=str(link))[0].start for link in range(50)}) == 4


def test_a_segment_in_which_a_resume_changed_something_is_not_run_again(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    records, link = read_chain(run / "chain.jsonl"), ""
    at = next(number for number, record in enumerate(records) if record["step"] == 6)
    start = {**records[0], "step": 5}
    records.insert(at, start | {"ranks": 2})
    records.insert(at + 1, start | {"step": 6, "environment": {"torch": "3"}, "ranks": 2})
    for record in records:
        link = record["link"] = link_of(link, record)
    (tmp_path / "run" / "chain.jsonl").write_text("".join(canonical(record) + "\n" for record in records))
    found = segments_of(read_claims(tmp_path / "run", "run"))
    assert [segment.reason for segment in found] == ["", "ranks changed at step 5, at a resume", "", ""]


def test_a_run_without_a_chain_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(STORED), "--segments", "0"]) == 65
    line = capsys.readouterr().err
    assert "has no chain.jsonl: a version of ticketworks before 0.2 trained it, or the file was removed" in line


@pytest.mark.parametrize(
    ("overrides", "error", "expected"),
    [
        (["data.val=/nowhere"], DataError, "data.val: /nowhere does not exist, so no segment can be run again"),
        (["sparsity.density=0.5"], ConfigError, "sparsity.density: 0.2 -> 0.5: changes what is computed"),
    ],
)
def test_settings_of_this_machine(run: Path, overrides: list[str], error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=expected):
        verify(str(run), num_segments=1, seed=0, overrides=overrides)


def test_data_that_is_not_here_is_a_note_and_other_data_an_error(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    verify(str(run), num_segments=0, seed=0, overrides=["data.val=/nowhere"])
    assert "note: data.val is not here (/nowhere), so its digest was not compared" in caplog.text
    train = run.parent / "train"
    with pytest.raises(DataError, match=r"data.val: .*train has digest .*, the run had "):
        verify(str(run), num_segments=0, seed=0, overrides=[f"data.val={train}"])


# -- tolerance


def test_the_bounds() -> None:
    assert loss_bound(1.0) == pytest.approx(0.15)
    assert accuracy_bound(0.9, 10_000) == pytest.approx(0.01 + 3 * math.sqrt(2 * 0.9 * 0.1 / 10_000))  # 2.3 points


def test_losses_and_accuracies_are_compared_where_bits_cannot_be(run: Path) -> None:
    from pipeline.verification.segments import Rerun

    claims = read_claims(run, "run")
    segment: Segment = segments_of(claims)[-1]
    config = load_config(str(run / "config.yaml"))
    here = Rerun(segment, run, segment.records, "a digest differs", {"torch": "2 -> 3"})
    problem, words = outside(claims, here, config)
    assert problem == ""
    (top1, num_images) = top1_of([run / "tickets" / "ticket-001.safetensors"], config)
    assert num_images == 80
    assert f"ticket-001 {100 * top1:.2f}% against {100 * top1:.2f}%" in words
    rows = json.loads((run / "report" / "report.json").read_text())["rows"]
    assert top1 == rows[1]["top1"]
    records = json.loads(json.dumps(segment.records))
    for record in records:
        for values in record.get("metrics", {}).values():
            if "train/loss" in values:
                values["train/loss"] += 1.0
    problem, _ = outside(claims, Rerun(segment, run, records, "", {}), config)
    assert problem.startswith("loss at step ")
