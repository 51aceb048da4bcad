"""The promises of docs/reliability.md: faults are injected into two ranks that train.

The table of that document names these tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.campaigns.regrouped import regrouped
from tests.campaigns.small_runs import ONE_PHASE, STEPS
from tests.end_to_end.fault_runs import Runs, assert_ends, assert_sound, flip_a_bit
from tests.support.launch import can_mount
from tests.support.ranks import RankServer

ONE_TICKET = [*ONE_PHASE, "plan.exploration.length=2 steps", "plan.exploration.update_interval=1 steps"]
needs_mount = pytest.mark.skipif(not can_mount(), reason="needs the right to mount a small file system")


def test_f1_the_rank_that_fails_is_reported_and_not_its_consequence(runs: Runs) -> None:
    job = runs.start(call="fail_in", on_rank=1, step=12, what="raise")
    assert_ends(
        job,
        [76, 1],
        r"^ERROR\[1\] rank=1 step=1\d unexpected ValueError: an image that nobody expected; do: .*\(traceback in ",
    )
    assert "an image that nobody expected" in (runs.output / "crash-rank1.txt").read_text()
    assert_sound(runs.output)


def test_f1_damaged_data_of_one_rank_is_reported_in_the_first_batch_and_in_an_evaluation(runs: Runs) -> None:
    """Each rank reads its own data: rank 0 does not see the damage that rank 1 finds."""
    job = runs.start(*ONE_TICKET, call="fail_in", on_rank=1, step=0, what="data")
    assert_ends(job, [76, 65], r"^ERROR\[65\] rank=1 an image that is damaged")
    again = runs.start(*ONE_TICKET, resume="auto")
    assert again.wait() == [0, 0], again.text
    given = [
        "--tickets",
        str(runs.output / "tickets"),
        "--data",
        str(runs.data / "val.beton"),
        "--output",
        str(runs.folder / "judged"),
    ]
    judging = runs.start(call="evaluate", on_rank=1, arguments=given)
    assert_ends(judging, [76, 65], r"^ERROR\[65\] rank=1 an image that is damaged")


@pytest.mark.parametrize(
    ("victim", "who"), [(1, r"from rank 1"), (0, r"from the host of the store \(rank 0, or its launcher\)")]
)
def test_f2_a_killed_rank_is_named_by_the_others(runs: Runs, victim: int, who: str) -> None:
    job = runs.start("train.collective_timeout_seconds=60")
    job.wait_for(lambda: runs.has(10))
    job.kill(ranks=[victim])
    codes = [76, 76]
    codes[victim] = -signal.SIGKILL
    assert_ends(
        job,
        codes,
        rf"^ERROR\[76\] rank={1 - victim} step=\d+ the collective in \w+ \(\w+\.py\): no response .*{who} within 3 s: ",
    )
    assert_sound(runs.output)


def test_f4_a_stop_that_comes_with_a_lost_peer_is_a_lost_peer(runs: Runs) -> None:
    """A launcher that cleans up sends SIGTERM to the remaining rank."""
    job = runs.start()
    job.wait_for(lambda: runs.has(10))
    job.kill(ranks=[1])
    job.kill(signal.SIGTERM, ranks=[0])
    assert_ends(job, [76, -signal.SIGKILL], r"^ERROR\[76\] rank=0 ")
    assert not list(runs.output.glob("checkpoints/step-*/.*"))
    assert_sound(runs.output)


def test_f5_a_kill_in_a_save_leaves_the_checkpoint_before(runs: Runs) -> None:
    label = "write half of checkpoints/.step-00000015.partial/.state.safetensors.tmp"
    job = runs.start(call="at_file_operation", on_rank=0, folder=str(runs.output), label=label)
    assert job.wait() == [-signal.SIGKILL, 76], job.text
    assert_sound(runs.output)
    assert list(runs.output.glob("checkpoints/.step-00000015.*.partial"))
    os.utime(runs.output / "checkpoints/step-00000010", (0, 0))  # F23: by the clock it is the oldest
    again = runs.start(resume="auto", call="fail_in", on_rank=1, step=21, what="term")
    assert again.wait() == [75, 75], again.text
    assert f"resumed from {runs.output}/checkpoints/step-00000010: step 10" in again.text
    assert not list(runs.output.glob("checkpoints/.*")), "what a kill left behind is removed"
    assert_sound(runs.output, at_least=2)


def test_f7_a_rank_that_hangs_is_named_in_time(runs: Runs) -> None:
    three = ["train.global_batch=48", "plan.reference_batch=48"]
    job = runs.start(
        "train.collective_timeout_seconds=4", *three, ranks=3, call="fail_in", on_rank=2, step=12, what="stop"
    )
    job.wait_for(lambda: runs.has(5))  # not 10: the thread that writes rank 2's part may also be stopped
    started = time.monotonic()
    job.wait_for(lambda: set(job.pids[:2]) <= set(job.server.ended), 30)
    assert time.monotonic() - started < 15
    job.kill()
    told = r"no response from rank 2 within 3 s: "
    assert_ends(
        job, [76, 76, -signal.SIGKILL], rf"^ERROR\[76\] rank=0 step=1\d the collective in \w+ \(\w+\.py\): {told}"
    )
    assert_sound(runs.output)


def test_f8_a_slow_rank_is_named(runs: Runs) -> None:
    job = runs.start(call="fail_in", on_rank=1, step=-1, what="slow", seconds=0.2)
    job.wait_for(lambda: "step 20/38" in job.text)
    job.kill()
    job.wait()
    told = re.findall(r"rank (\d) is slow: (\d+) ms of its own work per step, median of the others (\d+) ms", job.text)
    assert [rank for rank, _, _ in told] == ["1"], "reported once"
    assert int(told[0][1]) > 200


def test_f9_a_nan_on_one_rank_ends_all_and_reaches_no_file(runs: Runs) -> None:
    job = runs.start(call="fail_in", on_rank=1, step=12, what="nan")
    assert_ends(
        job,
        [79, 79],
        r"^ERROR\[79\] rank=1 step=12 loss nan or gradient norm nan is not finite; no weight or mask was changed; do:",
    )
    assert_sound(runs.output)
    newest = max((runs.output / "checkpoints").glob("step-*"))
    tensors = load_file(newest / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


@pytest.mark.parametrize(
    ("on_ranks", "expected"),
    [
        (
            [1],
            r"masks differ between ranks after step 1\d: first in blocks\.1\.conv1\.weight, ranks \[1\] against rank 0",
        ),  # F10
        ([0, 1], r"the mask of blocks\.1\.conv1\.weight has changed since update 2, without an update"),  # F11
    ],
)
def test_f10_f11_a_flipped_mask_bit_is_found(runs: Runs, on_ranks: list[int], expected: str) -> None:
    """It flips after the update of step 8, before the update of step 12 and the check of step 14."""
    more = ["sparsity.check_every=2"] if on_ranks == [0, 1] else []
    job = runs.start(*more, call="flip_mask_bit", on_ranks=on_ranks, step=9)
    told = assert_ends(job, [78, 78], r"^ERROR\[78\] rank=0 step=\d+ ")
    assert re.search(expected, told), told
    assert_sound(runs.output)


def test_f12_f25_damaged_files_are_skipped_with_a_warning_and_nothing_restarts_from_0(runs: Runs) -> None:
    job = runs.start(call="fail_in", on_rank=1, step=23, what="term")
    assert job.wait() == [75, 75], job.text
    checkpoints = runs.output / "checkpoints"
    flip_a_bit(checkpoints / "step-00000024/state.safetensors")
    again = runs.start(resume="auto", call="fail_in", on_rank=1, step=23, what="term")
    assert again.wait() == [75, 75], again.text
    assert f"checkpoint is not used: {checkpoints}/step-00000024: state.safetensors: expected sha256 " in again.text
    assert f"resumed from {checkpoints}/step-00000022: step 22" in again.text
    assert_sound(runs.output, at_least=2)

    (ticket,) = (runs.output / "tickets").glob("*.safetensors")
    flip_a_bit(ticket)
    missing = runs.start(resume="auto")
    told = rf"{runs.output}/tickets: tickets \[0\] are missing or damaged, expected before step 24"
    assert_ends(missing, [78, 78], rf"^ERROR\[78\] rank=0 {told}; do: restore them")
    assert f"1 of 1 ticket files in {runs.output}/tickets were left out" in missing.text
    for folder in checkpoints.glob("step-*"):
        flip_a_bit(folder / "rank-1.safetensors")
    none = runs.start(resume="auto")
    assert_ends(
        none,
        [78, 78],
        r"^ERROR\[78\] rank=0 no valid checkpoint: .*rank-1\.safetensors: expected sha256 ",
    )


@needs_mount
def test_f13_a_full_disk_keeps_what_was_saved(runs: Runs) -> None:
    runs.output.mkdir()
    seen = runs.server.mount(runs.output, "size=4m")
    job = runs.start("tracking.backend=none")  # otherwise the disk could be too full for the end of metrics.jsonl
    job.wait_for(lambda: (seen / "checkpoints/step-00000010/manifest.json").exists())
    with (seen / "filler").open("wb") as filler:
        filler.write(bytes(max(0, shutil.disk_usage(seen).free - 12 * 1024)))
    assert_ends(
        job,
        [73, 73],
        rf"^ERROR\[73\] rank=\d step=\d+ {runs.output}/\S+: "
        r"no space: [1-9]\d* bytes needed, \d+ free; do: free some disk space and resume",
    )
    assert_sound(seen)
    (seen / "filler").unlink()
    again = runs.start("tracking.backend=none", resume="auto", call="fail_in", on_rank=1, step=21, what="term")
    assert again.wait() == [75, 75], again.text
    assert_sound(seen)


def test_f15_a_second_job_in_the_folder_of_a_live_one_is_refused(runs: Runs) -> None:
    first = runs.start(call="fail_in", on_rank=0, step=-1, what="slow", seconds=0.3)
    first.wait_for(lambda: runs.has(5))
    second = runs.start(resume="auto")
    who = rf"is in use by process {first.pids[0]} on \S+ since 20\d\d-\d\d-\d\dT\S+"
    assert_ends(
        second,
        [73, 73],
        rf"^ERROR\[73\] rank=0 {runs.output}: {who}; do: wait for it to end, or choose another output_dir",
    )
    assert not first.is_over
    first.kill(signal.SIGTERM)
    assert first.wait() == [75, 75]
    assert_sound(runs.output)


def test_f19_a_server_that_never_answers_and_then_dies_costs_seconds_and_a_warning(runs: Runs) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        job = runs.start("tracking.backend=mlflow", f"tracking.uri=http://127.0.0.1:{silent.getsockname()[1]}")
        job.wait_for(lambda: runs.has(10), 40)
    assert job.wait() == [0, 0], job.text
    assert job.text.count("is not accepting records") == 1, job.text
    assert re.search(
        r"\d+ records have not reached MLflow at .*; do: python -m pipeline\.tracking replay ", job.text
    ), job.text
    steps = [json.loads(line).get("step") for line in (runs.output / "metrics.jsonl").read_text().splitlines()]
    assert {9, 19, 29, 37} <= set(steps)


def test_f20_f21_f27_what_a_resume_changes_is_refused_or_reported(runs: Runs) -> None:
    job = runs.start("train.threads_per_rank=1", call="fail_in", on_rank=1, step=12, what="term")
    assert job.wait() == [75, 75], job.text
    other = runs.start("train.weight_decay=0.001", "seed=7", resume="auto")
    changes = r"seed: 0 -> 7; train\.weight_decay: 0\.0005 -> 0\.001; do: .* --allow-change KEY"
    assert_ends(
        other,
        [64, 64],
        rf"^ERROR\[64\] rank=0 .*step-00000013: the configuration differs from that of the checkpoint: {changes}",
    )
    allowed = runs.start(
        *("train.weight_decay=0.001", "--allow-change", "train.weight_decay", "train.threads_per_rank=2"),
        resume="auto",
        ranks=1,
        call="fail_in",
        on_rank=0,
        step=14,
        what="term",
    )
    assert allowed.wait() == [75], allowed.text
    said = r"resume is not bit-exact: train\.weight_decay: 0\.0005 -> 0\.001, threads 1 -> 2, ranks 2 -> 1, "
    said += "masks and the order of samples are"
    assert re.search(said, allowed.text), allowed.text
    assert "resumed from" in allowed.text


def test_f20_other_numbers_of_ranks_see_the_same_samples_and_masks(
    server: RankServer, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert regrouped(server, data, tmp_path, ranks=(2, 1), stops=(9, None)), capsys.readouterr().out
    assert f"samples of {STEPS} steps: the same" in capsys.readouterr().out


@needs_mount
def test_f24_a_folder_without_write_permission_is_reported_before_step_0(runs: Runs) -> None:
    """On a read-only mount, and for a user without permission."""
    refused = "give this user write access"
    runs.output.mkdir()
    runs.server.mount(runs.output, "ro,mode=1777")
    closed = [folder for folder in (runs.data, runs.folder, *runs.data.parents) if not folder.stat().st_mode & 0o005]
    try:
        for folder in closed:  # folders of root: the other user must reach data and output, as on a cluster
            folder.chmod(folder.stat().st_mode | 0o005)
        told = rf"{runs.output}\S*: user 65534 may not write here \(Read-only file system\)"
        job = runs.start(call="as_user", uid=65534, at="launchers.train_cli:check_output")
        assert_ends(job, [77, 77], rf"^ERROR\[77\] rank=0 {told}; do: {refused}")
        runs.output = runs.folder / "locked" / "run"
        runs.output.parent.mkdir(mode=0o755)
        told = rf"{runs.output}: user 65534 may not write here \(Permission denied\)"
        assert_ends(runs.start(call="as_user", uid=65534), [77, 77], rf"^ERROR\[77\] rank=0 {told}; do: {refused}")
    finally:
        for folder in closed:
            folder.chmod(folder.stat().st_mode & ~0o005)
    assert not list(runs.output.parent.iterdir())
