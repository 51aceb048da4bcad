"""A small version of the main job, with real processes.

A run that is repeated, and a run that is killed and resumed, end with the same bits.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launchers import bundle as bundle_command
from pipeline.chain import START, read_chain
from pipeline.verification.claims import read_claims
from pipeline.verification.segments import draw, segments_of
from tests.end_to_end.small_job import NUM_VAL, STEPS, TRAIN, arguments, assert_same, tickets_of
from tests.end_to_end.test_preemption import SECONDS_TO_SAFE
from tests.support.launch import can_mount, command, kill, run, start
from tests.support.ranks import RankServer


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one uninterrupted run of two ranks under deepspeed, with num_classes of the data set."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    text = run(
        command("deepspeed", TRAIN, arguments(data, output, "model.num_classes=0")), log=output.with_suffix(".log")
    )
    assert re.search(r"superposition-mean +\d", text), text[-3000:]
    return output


def test_a_run_leaves_tickets_report_and_metrics(finished: Path) -> None:
    tickets = tickets_of(finished)
    assert [ticket.provenance.phase for ticket in tickets] == ["exploration", "refinement-1", "refinement-2"]
    assert [ticket.density for ticket in tickets] == pytest.approx([0.1] * 3, abs=1e-4)
    assert [ticket.provenance.num_classes for ticket in tickets] == [10] * 3
    assert "  num_classes: 10\n" in (finished / "config.yaml").read_text()
    assert [t.provenance.r_s for t in tickets] == sorted(t.provenance.r_s for t in tickets)
    report = json.loads((finished / "report" / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == [
        *("ticket-0", "ticket-1", "ticket-2", "superposition-mean", "ensemble-2", "ensemble-3"),
    ]
    assert report["num_images"] == NUM_VAL
    assert all(0.3 < row["top1"] <= 1 for row in report["rows"])  # 124 small steps: far above the 0.1 of chance
    by_name = {row["name"]: row for row in report["rows"]}
    assert by_name["superposition-mean"]["density"] == by_name["ticket-2"]["density"]
    assert by_name["ensemble-3"]["num_parameters"] == sum(by_name[f"ticket-{i}"]["num_parameters"] for i in range(3))
    assert (finished / "report" / "report.png").read_bytes().startswith(b"\x89PNG")
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    losses = [record["metrics"]["train/loss"] for record in metrics if "train/loss" in record.get("metrics", {})]
    assert len(losses) >= STEPS // 10
    assert losses[-1] < losses[0]


def test_the_log_warns_only_of_what_a_person_can_act_on(finished: Path) -> None:
    """No library says anything; the plan of so short a run has few updates. Lines of the launcher begin with [20…."""
    lines = [line for line in finished.with_suffix(".log").read_text().splitlines() if not line.startswith("[20")]
    told = [line for line in lines if re.search("warn|deprecat", line, re.IGNORECASE)]
    expected = r"\d\d:\d\d:\d\d warning: (exploration(:| has)|refinement-\d(:| has)|rank \d is slow)"
    assert all(re.match(expected, line) for line in told), told
    assert not [line for line in lines if line.startswith("[rank 1]")]


def test_a_run_stopped_and_killed_under_every_launcher_ends_bit_for_bit_alike(
    finished: Path, data: Path, server: RankServer, tmp_path: Path
) -> None:
    """Stop it by each launcher.

    SIGTERM to the supervisor as PID 1 of a container; SIGTERM to the ranks under deepspeed, as Slurm
    does; SIGKILL under torchrun.
    """
    output = tmp_path / "stopped"

    def wait_for(step: int, process: subprocess.Popen[bytes], log: Path) -> None:
        deadline = time.monotonic() + 240
        while not (output / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, "no checkpoint came"
            time.sleep(0.002)

    def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
        return [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if child.environ().get("RANK") and str(TRAIN) in child.cmdline()
        ]

    resumed = arguments(data, output, "--resume", "auto")
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"] if can_mount() else []
    stops = [
        (20, [*container, sys.executable, "-m", "launchers.run", "--nproc-per-node", "2", "--", str(TRAIN), *resumed]),
        (50, command("deepspeed", TRAIN, resumed)),
        (80, command("torchrun", TRAIN, resumed)),
    ]
    for (step, line), how in zip(stops, ("supervisor", "ranks", "kill"), strict=True):
        log = tmp_path / f"{how}.log"
        process = start(line, log=log)
        try:
            wait_for(step, process, log)
            started = time.monotonic()
            if how == "supervisor":
                psutil.Process(process.pid).children()[0].terminate() if container else process.terminate()
            if how == "ranks":
                for rank in ranks_of(process):
                    rank.terminate()
            if how != "kill":
                assert process.wait(60) == 75, log.read_text()[-3000:]
                assert time.monotonic() - started < SECONDS_TO_SAFE
                told = re.findall(r"^STOPPED\[75\] rank=0 .*; resume with: (.*)$", log.read_text(), re.MULTILINE)
                started_by = line[len(container) if how == "supervisor" else 0 : -len(resumed)]
                assert told == [shlex.join([*started_by, *arguments(data, output), "--resume", "auto"])]
                assert not re.search(r"^ERROR\[", log.read_text(), re.MULTILINE)
        finally:
            kill(process)  # SIGKILL, all ranks
    assert not (output / "report").exists()
    job = server.start(resumed, log=tmp_path / "resumed.log")
    assert job.wait() == [0, 0], job.text[-4000:]
    step_found = re.search(r"resumed from \S+: step (\d+)", job.text)
    assert step_found is not None
    assert 80 <= int(step_found[1]) < STEPS
    tickets = tickets_of(finished), tickets_of(output)
    assert_same(*tickets)
    # and the same digests after every report and checkpoint, wherever it was stopped
    chains = [read_chain(folder / "chain.jsonl") for folder in (finished, output)]
    digests = [[record | {"link": ""} for record in chain if record["kind"] != START] for chain in chains]
    assert len(digests[0]) > STEPS // 5
    assert digests[0] == digests[1]
    # each launcher decides itself how many threads a rank has; where all had the same, the bytes are equal
    if [record["kind"] for record in chains[1]].count(START) == 1 and chains[0][0] == chains[1][0]:
        assert (finished / "chain.jsonl").read_bytes() == (output / "chain.jsonl").read_bytes()
    # one counted the classes, the other was given their number
    assert len({ticket.provenance.config_digest for of_run in tickets for ticket in of_run}) == 1


def test_a_bundle_of_a_run_under_a_launcher_is_verified_with_equal_bits_on_two_ranks(
    finished: Path, tmp_path: Path
) -> None:
    """By a command that starts ranks itself; the drawn segment is the last one, with the report."""
    bundle = tmp_path / "a.tar"
    assert bundle_command.main([str(finished), "--output", str(bundle)]) == 0
    claims = read_claims(finished, "the run")
    segments, link = segments_of(claims), claims.records[-1]["link"]
    assert [segment.name for segment in segments] == [f"steps 0–{STEPS - 4}", f"steps {STEPS - 4}–{STEPS}"]
    seed = next(seed for seed in range(100) if draw(segments, 1, seed=seed, link=link) == segments[1:])
    text = run(
        [sys.executable, "-m", "launchers.verify", str(bundle), "--seed", str(seed)], log=tmp_path / "verify.log"
    )
    assert f"running steps {STEPS - 4}–{STEPS} again on 2 ranks" in text
    assert text.splitlines()[-1].startswith(f"VERIFIED {bundle}: 1 of 2 segments run again (seed {seed}, ")
    assert " with equal bits; " in text.splitlines()[-1]


def test_a_changed_configuration_is_not_resumed(finished: Path, data: Path, server: RankServer, tmp_path: Path) -> None:
    job = server.start(
        arguments(data, finished, "--resume", "auto", "sparsity.density=0.2"), ranks=1, log=tmp_path / "log"
    )
    assert job.wait() == [64]
    assert "sparsity.density: 0.1 -> 0.2" in job.text


def test_a_second_run_in_the_same_folder_is_refused(
    finished: Path, data: Path, server: RankServer, tmp_path: Path
) -> None:
    job = server.start(arguments(data, finished), ranks=1, log=tmp_path / "log")
    assert job.wait() == [73]
    run_id = json.loads((finished / "run.json").read_text())["run_id"]
    assert f"{finished}: already holds run {run_id}; do: continue it with --resume auto" in job.text


@pytest.mark.parametrize(
    ("damage", "override", "code", "expected"),
    [
        ("missing", "", 65, "train.beton"),
        ("truncated", "", 65, "truncated or only partly copied"),
        ("table", "", 65, "differs from the one in the sidecar, so the file is damaged"),
        ("label", "", 65, "expected 0–6 for 7 classes"),
        ("none", "model.num_classes=5", 65, "has 10 classes, but model.num_classes is 5; do: set model.num_classes=10"),
        ("none", "model.num_classes=1000", 65, "has 10 classes, but model.num_classes is 1000"),
        ("none", "data.val=/nonexistent/val.beton", 65, "/nonexistent/val.beton"),
    ],
)
def test_bad_data_is_one_line_before_anything_starts(
    data: Path, tmp_path: Path, damage: str, override: str, code: int, expected: str
) -> None:
    for name in ("train.beton", "train.beton.json", "val.beton", "val.beton.json"):
        content = bytearray((data / name).read_bytes())
        if name == "train.beton" and damage == "truncated":
            content = content[: len(content) // 2]
        if name == "train.beton" and damage == "table":
            content[100] ^= 0xFF
        if name == "train.beton.json" and damage == "label":  # a valid sidecar, made for seven classes only
            sidecar = json.loads(content)
            classes = sidecar["classes"][:7]
            text = json.dumps(classes, ensure_ascii=False, separators=(",", ":"))
            sidecar |= {"classes": classes, "classes_sha256": hashlib.sha256(text.encode()).hexdigest()}
            content = bytearray(json.dumps(sidecar).encode())
        if not (name == "train.beton" and damage == "missing"):
            (tmp_path / name).write_bytes(content)
    started = time.monotonic()
    options = arguments(tmp_path, tmp_path / "run", *filter(None, [override]))
    process = start(command("python", TRAIN, options), log=tmp_path / "log")
    assert process.wait(60) == code
    assert time.monotonic() - started < 10
    errors = [line for line in (tmp_path / "log").read_text().splitlines() if line.strip()]
    assert len(errors) == 1
    assert errors[0].startswith(f"ERROR[{code}] rank=0 ")
    assert expected in errors[0]
    assert not (tmp_path / "run").exists()
