"""launchers/sweep.py: the product of settings and seeds, stopped, killed and continued."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from scipy import stats

from launchers import sweep_cli, sweep_jobs
from launchers.sweep_cli import parse
from launchers.sweep_jobs import HowToRun, run_members
from launchers.sweep_members import LOG, Member, axes_of, load_record, members_of, opened_record, split
from pipeline.config.load import load_config
from pipeline.errors import ConfigError, IntegrityError, WriteError
from pipeline.evaluation.predictions import load_predictions
from pipeline.files import only_process_in
from tests.support import sweeps
from tests.support.launch import ROOT, kill, start
from tests.support.sweeps import leave_report, members

# -- which runs there are


def test_the_product_in_readable_folders(configuration: Path, tmp_path: Path) -> None:
    found = members(
        configuration,
        tmp_path,
        ["sparsity.method=set,rigl_itop", "evaluation.ticket_weights=[],[0.25, 0.75]"],
        variants=["short:", "long: plan.exploration.length=20 steps, plan.refinement.length=8 steps"],
        seeds=[0, 7],
    )
    assert len(found) == 16
    assert [member.name for member in found[:3]] == [
        "variant=short,method=set,ticket_weights=,seed=0",
        "variant=short,method=set,ticket_weights=,seed=7",
        "variant=short,method=set,ticket_weights=0.25_0.75,seed=0",
    ]
    last = found[-1].config
    assert (last.seed, last.sparsity.method, last.evaluation.ticket_weights) == (7, "rigl_itop", [0.25, 0.75])
    assert (last.plan.exploration.length, last.plan.refinement.length) == ("20 steps", "8 steps")  # type: ignore[union-attr]
    assert last.output_dir == str(tmp_path / found[-1].name)
    assert last.tracking.run_name == "" and f"tracking.run_name=small,{found[-1].name}" in found[-1].settings


def test_values_are_split_outside_of_brackets_and_quotes() -> None:
    assert split("a,{b: 1, c: [2, 3]}, 'd, e' ,it's", option="") == ["a", "{b: 1, c: [2, 3]}", "'d, e'", "it's"]
    assert split("''", option="") == ["''"]
    assert [axis.name for axis in axes_of(["data.order=random", "train.optimizer=sgd", "a.seed=1"], [])] == [
        *("order", "optimizer", "a.seed"),
    ]
    same_ends = axes_of(["plan.exploration.length=5 steps", "plan.refinement.length=5 steps"], [])
    assert [axis.name for axis in same_ends] == ["plan.exploration.length", "plan.refinement.length"]


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [0, 1, 2]), ("8-10", [8, 9, 10]), ("3,9,5", [3, 9, 5]), ("4,", [4]), ("6-6", [6])]
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse(["--config", "x", "--output", "y", "--seeds", text]).seeds == seeds


@pytest.mark.parametrize("text", ["0", "5-3", "1,1", "-1", "x", "", "1.5", "99999999999"])
def test_no_seeds(text: str) -> None:
    with pytest.raises(ConfigError, match="--seeds"):
        parse(["--config", "x", "--output", "y", f"--seeds={text}"])


# -- how they are run


@dataclass(frozen=True)
class Script(HowToRun):
    """Runs a script in place of training; the report it leaves makes the member done."""

    script: str = ""

    def command(self, member: Member) -> list[str]:
        return [sys.executable, "-c", self.script, member.config.output_dir]


REPORTS = "import os, sys; os.makedirs(sys.argv[1] + '/report'); open(sys.argv[1] + '/report/report.json', 'w')"


def test_a_member_that_still_runs_elsewhere_is_waited_for(configuration: Path, tmp_path: Path) -> None:
    """As after SIGKILL of the sweep, which its members survive."""
    two = members(configuration, tmp_path, [], seeds=[0, 1])
    record = opened_record(tmp_path, two)
    left = tmp_path / two[0].name
    left.mkdir()
    with only_process_in(left):
        running = threading.Timer(0.0, run_members, (two, record, Script("", script=REPORTS)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sweep_jobs, "SIGNALS", ())  # only the main thread may set handlers
            running.start()
            deadline = time.monotonic() + 20
            while not record.is_done(two[1].name) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert record.is_done(two[1].name) and running.is_alive()
            assert not (left / LOG).exists()
    running.join(20)
    assert record.is_done(two[0].name) and not running.is_alive()


def test_a_member_that_another_process_claims_at_the_same_moment_is_waited_for(
    configuration: Path, tmp_path: Path
) -> None:
    """As when the sweep is killed right after it has started a member, and started again at once."""
    (one,) = members(configuration, tmp_path, [])
    record = opened_record(tmp_path, [one])
    folder = tmp_path / one.name
    folder.mkdir()
    # the first process loses against one that holds the folder for a second; the next one is alone
    script = f"""
import os, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from pipeline.files import only_process_in
if not (Path(sys.argv[1]) / "other").exists():
    hold = "import sys, time; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; "
    hold += "from pipeline.files import only_process_in\\nwith only_process_in(Path(sys.argv[1])): "
    hold += "Path(sys.argv[1], 'other').touch(); time.sleep(1)"
    subprocess.Popen([sys.executable, "-c", hold.replace("\\\\n", chr(10)), sys.argv[1]])
    while not (Path(sys.argv[1]) / "other").exists():
        time.sleep(0.01)
    sys.exit(73)
{REPORTS}
"""
    run_members([one], record, Script("", script=script))
    assert record.is_done(one.name) and record.members[one.name]["exit_code"] == 0
    assert (folder / LOG).read_text().count("$ ") == 2


def test_a_failed_member_ends_nothing_and_is_tried_again(configuration: Path, tmp_path: Path) -> None:
    two = members(configuration, tmp_path, [], seeds=[0, 1])
    fails = f"import sys\nif 'seed=0' in sys.argv[1]: print('ERROR[79] not finite'); sys.exit(79)\n{REPORTS}"
    record = opened_record(tmp_path, two)
    run_members(two, record, Script("", script=fails))
    record = load_record(tmp_path) or pytest.fail("no record")
    assert [record.is_done(member.name) for member in two] == [False, True]
    assert record.members["seed=0"]["exit_code"] == 79
    log = tmp_path / "seed=0" / LOG
    assert sweep_jobs.last_error(log) == "ERROR[79] not finite" and log.read_text().count("$ ") == 1
    run_members(two, record, Script("", script=REPORTS))
    assert [record.is_done(member.name) for member in two] == [True, True]
    assert log.read_text().count("$ ") == 2 and (tmp_path / "seed=1" / LOG).read_text().count("$ ") == 1


def test_threads_and_gpus_are_shared(configuration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = members(configuration, tmp_path, ["train.threads_per_rank=0"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.setattr("pipeline.limits.cpu_quota", lambda *root: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert HowToRun("x").threads_of(one) == 0  # all, which training decides
    assert HowToRun("x", num_jobs=3, num_ranks=2).threads_of(one) == 2
    assert HowToRun("x", num_jobs=30).threads_of(one) == 1
    assert HowToRun("x", num_jobs=3, num_threads=5).threads_of(one) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert HowToRun("x", num_jobs=3).threads_of(one) == 0  # the member itself reads the variable
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("pipeline.limits.cpu_quota", lambda *root: 6)
    assert HowToRun("x", num_jobs=3).threads_of(one) == 2
    monkeypatch.setattr("pipeline.limits.cpu_quota", lambda *root: None)
    command = HowToRun("x", num_jobs=3, num_ranks=2).command(one)
    assert command[1:5] == ["-m", "launchers.run", "--nproc-per-node", "2"] and "train.threads_per_rank=2" in command
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    environments = [HowToRun("x", num_jobs=2, num_ranks=2).environment(slot, parent_run="p") for slot in (0, 1)]
    assert [environ["CUDA_VISIBLE_DEVICES"] for environ in environments] == ["4,5", "6,7"]
    assert environments[0]["TICKETWORKS_PARENT_RUN"] == "p" and "MLFLOW_RUN_ID" not in environments[0]


def test_the_others_are_stopped_when_the_disk_is_full(
    configuration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = members(configuration, tmp_path, [], seeds=[0, 1])
    record = opened_record(tmp_path, two)
    waits = f"import sys, time\nif 'seed=1' in sys.argv[1]: time.sleep(60)\n{REPORTS}"

    def fail(*how: Any) -> None:
        raise WriteError("no space")

    monkeypatch.setattr(record, "ended", fail)
    started, before = time.monotonic(), psutil.Process().children()  # such as a server that other tests share
    with pytest.raises(WriteError, match="no space"):
        run_members(two, record, Script("", num_jobs=2, script=waits))
    assert time.monotonic() - started < 30
    assert psutil.Process().children() == before


def test_dry_run_only_and_a_second_sweep(
    configuration: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["--config", str(configuration), "--set", "sparsity.method=set,rigl_itop", "--output", str(tmp_path)]
    line += ["--seeds", "2"]

    def main(*more: str) -> tuple[int, str, str]:
        code = sweep_cli.main(pytest.fail, [*line, *more])
        return code, *capfd.readouterr()

    all_members = members(configuration, tmp_path, ["sparsity.method=set,rigl_itop"], seeds=[0, 1])
    record = opened_record(tmp_path, all_members)
    leave_report(tmp_path / "method=set,seed=0" / "report", 0, 0.5)
    record.ended("method=set,seed=0", 0, 1.0)
    half_done = tmp_path / "method=rigl_itop,seed=1"
    (half_done / "checkpoints" / "step-00000004").mkdir(parents=True)
    (half_done / "run.json").write_text('{"run_id": "a"}')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, out, err = main("--dry-run", "--jobs", "2")
    assert (code, err) == (0, "") and before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    first, *rest = out.splitlines()
    assert first == f"2 combinations × 2 seeds = 4 runs in {tmp_path}, 2 at once, each with 1 rank of 1 thread"
    assert [text for text in rest if not text.startswith(" ")] == [
        *("done      method=set,seed=0", "start     method=set,seed=1"),
        *("start     method=rigl_itop,seed=0", "continue  method=rigl_itop,seed=1"),
    ]
    assert [shlex.split(text) for text in rest if text.startswith(" ")][2] == HowToRun(str(configuration)).command(
        all_members[3]
    )
    _, out, _ = main("--dry-run", "--only", "seed=1,method=set", "--only", "method=rigl_itop")
    assert [text.split()[1] for text in out.splitlines()[1:] if not text.startswith(" ")] == [
        *("method=set,seed=1", "method=rigl_itop,seed=0", "method=rigl_itop,seed=1"),
    ]
    code, _, err = main("--dry-run", "--only", "seed=2")
    assert code == 64 and "--only seed=2: chooses no run; do: write values as in method=set,seed=0" in err
    with only_process_in(tmp_path):
        code, _, err = main()
    assert code == 73 and f"{tmp_path}: a sweep is running here: process {os.getpid()} on " in err
    code, out, err = main("--table", "--format", "csv")
    assert (code, err) == (0, "") and out.startswith("method,network,seeds,top1,") and out.count("\n") == 4


def test_tasks_of_an_array(configuration: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep_cli.ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8" and sweep_cli.ranges([3]) == "3"
    line = ["--config", str(configuration), "--seeds", "2", "--output", str(tmp_path / "sweep")]
    for number, message in (("2", "the sweep has 2 runs, counted from 0"), ("1", "holds no sweep; do: run the same")):
        assert sweep_cli.main(pytest.fail, [*line, "--member", number]) == 64
        assert message in capfd.readouterr().err
    record = opened_record(tmp_path, members(configuration, tmp_path, [], seeds=[0, 1]))
    report = tmp_path / "seed=1" / "report"
    report.mkdir(parents=True)
    (report / "report.json").touch()
    assert not record.is_done("seed=1")  # it may have been killed while it wrote the report
    (report / "report.html").touch()
    assert record.is_done("seed=1") and not record.is_done("seed=0")
    with only_process_in(tmp_path / "seed=1"):
        assert not record.is_done("seed=1")
    record.members["seed=1"]["exit_code"] = 79
    assert not record.is_done("seed=1")


# -- which sweep a folder holds


def test_what_was_changed_is_named_and_what_was_added_is_run(configuration: Path, tmp_path: Path) -> None:
    sets = ["sparsity.method=set,rigl_itop"]
    record = opened_record(tmp_path, members(configuration, tmp_path, sets, seeds=[0, 1]))
    record.ended("method=set,seed=1", 0, 1.5)
    more = members(configuration, tmp_path, ["sparsity.method=snfs,set,rigl_itop"], seeds=[0, 1, 2])
    added = opened_record(tmp_path, more)
    assert list(added.members) == [member.name for member in more] and len(more) == 9
    assert added.members["method=set,seed=1"]["exit_code"] == 0
    for changed, named in (
        (members(configuration, tmp_path, ["sparsity.method=set"], seeds=[0, 1]), "method=rigl_itop was left out"),
        (members(configuration, tmp_path, sets, seeds=[0, 2]), "seed=1 was left out"),
        (members(configuration, tmp_path, [*sets, "train.momentum=0.5"], seeds=[0, 1]), "it varies method, not method"),
        (
            members_of(
                axes_of(sets, []),
                [0, 1],
                settings=[],
                folder=tmp_path,
                load=lambda own: load_config(str(configuration), ["train.momentum=0.5", *own]),
            ),
            "method=set,seed=0: train.momentum: 0.9 -> 0.5",
        ),
    ):
        with pytest.raises(ConfigError, match="holds another sweep: .*" + re.escape(named)):
            opened_record(tmp_path, changed)


def test_folders_that_hold_something_else(configuration: Path, tmp_path: Path) -> None:
    one = members(configuration, tmp_path, [])
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(WriteError, match="holds a run, not a sweep"):
        opened_record(tmp_path, one)
    for damaged in ('{"members": {"a": 1}}', "[]", "x", '{"members": {"../a": {}}, "tracker_run": ""}'):
        (tmp_path / "sweep.json").write_text(damaged)
        with pytest.raises(IntegrityError, match="is not the record of a sweep"):
            opened_record(tmp_path, one)


# -- the whole


def _is_pending(sent: signal.Signals, pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return any(int(mask, 16) >> (sent - 1) & 1 for mask in re.findall(r"^S(?:ig|hd)Pnd:\s*(\w+)", status, re.MULTILINE))


def test_a_stopped_sweep_goes_on_and_its_failed_runs_are_named(configuration: Path, tmp_path: Path) -> None:
    """2 methods × 2 seeds: a member is killed, and the sweep is stopped; then again, with a variant without data."""
    folder, log = tmp_path / "sweep", tmp_path / "log"
    arguments = ["--config", str(configuration), "--seeds", "2", "--output", str(folder), "--jobs", "2", "--nice", "1"]
    arguments += [f"--variant={method}: sparsity.method={method}" for method in ("set", "rigl_itop")]
    killed, stopped = (folder / f"variant=set,seed={seed}" for seed in (0, 1))
    process = start(sweeps.command(*arguments), log=log)
    try:
        deadline, halted = time.monotonic() + 120, dict[Path, psutil.Process]()
        while len(halted) < 2:  # each is halted after its first checkpoint, so that neither ends before its turn
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            for each in {killed, stopped} - halted.keys():
                if list(each.glob("checkpoints/step-*/manifest.json")):
                    (halted[each],) = (
                        child for child in psutil.Process(process.pid).children() if str(each) in str(child.cmdline())
                    )
                    halted[each].suspend()
            time.sleep(0.002)
        assert halted[killed].nice() == psutil.Process().nice() + 1
        halted[killed].kill()
        process.terminate()
        while not _is_pending(signal.SIGTERM, halted[stopped].pid):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.002)
        halted[stopped].resume()
        assert process.wait(60) == 75, log.read_text()
    finally:
        kill(process)
    told = r"^STOPPED\[75\] sweep stopped by a signal: 0 of 4 runs are done; resume with: (.*)$"
    (command,) = re.findall(told, log.read_text(), re.MULTILINE)
    assert shlex.split(command)[2:] == arguments and "Traceback" not in log.read_text()

    again = [*shlex.split(command)[1:], "--variant=missing: data.val=/nowhere"]
    done = subprocess.run([sys.executable, *again], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(
        "ERROR[1] 2 runs failed: variant=missing,seed=0 (exit code 65"
    )
    assert done.stderr.count("\n") == 1 and done.stdout.count(": ERROR[65] rank=0 /nowhere: does not exist") == 4
    assert all("resumed from" in (each / LOG).read_text() for each in (killed, stopped))
    assert (folder / "table.txt").read_text() in done.stdout
    table = json.loads((folder / "table.json").read_text())
    assert list(table["failed"]) == ["variant=missing,seed=0", "variant=missing,seed=1"] and not table["num_missing"]
    names = {"last ticket": "ticket-1", "superposition": "superposition-mean", "largest ensemble": "ensemble-2"}
    assert [(row["network"], row["combination"]) for row in table["rows"]] == [
        (network, f"variant={method}") for network in names for method in ("set", "rigl_itop")
    ]
    for row in table["rows"][1::2]:
        nll = {
            (method, seed): float(of.nll[of.names.index(names[row["network"]])].mean(dtype=np.float64))
            for method in ("set", "rigl_itop")
            for seed in (0, 1)
            if (of := load_predictions(folder / f"variant={method},seed={seed}" / "report" / "predictions.npz"))
        }
        differences = [nll["rigl_itop", seed] - nll["set", seed] for seed in (0, 1)]
        margin = stats.t.ppf(0.975, 1) * stats.sem(differences)
        expected = (np.mean(differences), np.mean(differences) - margin, np.mean(differences) + margin)
        found = row["differences"]["nll"]
        assert (found["mean"], found["low"], found["high"]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    tracked = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    parent = json.loads((folder / "sweep" / "metrics.jsonl").read_text().splitlines()[0])["run"]
    assert {"mlflow.parentRunId": parent} in [record.get("tags") for record in tracked]
