from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shutil
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import files, models
from pipeline.chain import Chain, read_chain
from pipeline.checkpoint import arithmetic, verify, writer
from pipeline.checkpoint.checkpoints import Checkpoints
from pipeline.checkpoint.verify import checkpoints_in, digests_of, read_state
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.engine.build import build_engine
from pipeline.engine.protocol import Engine
from pipeline.errors import ConfigError, IntegrityError, PermissionDenied, WriteError
from pipeline.plan import build_plan
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS
from pipeline.tickets.best import BestTicket
from pipeline.training import run_folder

OVERRIDES = [
    *(
        "data.train=t",
        "data.val=v",
        "model.args={width: 8, stem_stride: 2}",
        "train.engine=torch",
        "train.global_batch=8",
    ),
    *("checkpoint.every=10 steps", "plan.reference_batch=8", "tracking.uri=http://me:hunter2@db:5000"),
]


@pytest.fixture
def config() -> Config:
    return load_config("fashion_mnist_s90", OVERRIDES)


def parts(config: Config, *, steps: int, method: str = "set") -> tuple[Engine, Sparsifier]:
    engine = build_engine(
        models.build(config.model.name, num_classes=10, args=config.model.args, seed=config.seed), config.train
    )
    shadows = [] if engine.average is None else [engine.average.module]
    sparsifier = Sparsifier(engine.model, engine.optimizer, METHODS[method], density=0.1, seed=0, shadows=shadows)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        engine.backward(
            torch.randn(8, 3, 28, 28, generator=generator), torch.randint(0, 10, (8,), generator=generator), lr=0.1
        )
        sparsifier.before_step(0.3)
        engine.step()
        sparsifier.after_step()
    return engine, sparsifier


def checkpoints(folder: Path, config: Config, **changes: Any) -> Checkpoints:
    return Checkpoints(
        folder, config, build_plan(config, steps_per_epoch=100), data_digest=changes.get("data_digest", "d1")
    )


def save(
    folder: Path, config: Config, step: int, engine: Engine, sparsifier: Sparsifier, *, tracker_run: str = ""
) -> Path:
    with checkpoints(folder, config) as saving:
        return saving.save(step, engine, sparsifier, tracker_run=tracker_run)


def state_of(engine: Engine, sparsifier: Sparsifier) -> list[torch.Tensor]:
    momenta = [engine.optimizer.state[parameter]["momentum_buffer"] for parameter in engine.model.parameters()]
    average = {} if engine.average is None else engine.average.module.state_dict()
    return [
        *engine.model.state_dict().values(),
        *average.values(),
        *momenta,
        *sparsifier.masks.values(),
        *sparsifier.ever_active.values(),
    ]


def test_everything_comes_back_bit_for_bit(tmp_path: Path, config: Config) -> None:
    engine, sparsifier = parts(config, steps=3)
    save(tmp_path, config, 3, engine, sparsifier, tracker_run="abc")
    random = torch.rand(3)  # drawn after the save
    engine2, sparsifier2 = parts(config, steps=0)
    start = checkpoints(tmp_path, config).load(engine2, sparsifier2, resume="auto")
    assert (start.step, start.tracker_run) == (3, "abc")
    assert sparsifier2.numbers() == sparsifier.numbers()
    assert torch.equal(torch.rand(3), random)
    pairs = list(zip(state_of(engine, sparsifier), state_of(engine2, sparsifier2), strict=True))
    assert len(pairs) > 60
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_run_without_ffcv_and_deepspeed_saves_and_resumes(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``data.loader=folder`` and ``train.engine=torch`` need neither."""
    real = metadata.version

    def installed(name: str) -> str:
        if name in ("ffcv", "deepspeed"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", installed)
    engine, sparsifier = parts(config, steps=1)
    folder = save(tmp_path, config, 1, engine, sparsifier)
    found = read_state(folder)["environment"]
    assert (found["ffcv"], found["deepspeed"], found["numpy"]) == ("not installed", "not installed", real("numpy"))
    assert checkpoints(tmp_path, config).load(engine, sparsifier, resume="auto").step == 1
    assert caplog.text == ""
    monkeypatch.undo()
    checkpoints(tmp_path, config).load(engine, sparsifier, resume="auto")
    assert f"resume is not bit-exact: ffcv not installed -> {real('ffcv')}" in caplog.text


def test_the_starts_of_segments_stay_beside_the_newest(tmp_path: Path, config: Config) -> None:
    keeping = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, keep=1, keep_every=2))
    engine, sparsifier = parts(config, steps=1)
    for step in (10, 20, 25, 30, 40, 50):  # every 10 steps, and one because the run was asked to stop
        save(tmp_path, keeping, step, engine, sparsifier)
    assert [path.name for path in checkpoints_in(tmp_path)] == [f"step-{step:08d}" for step in (50, 40, 20)]


def test_a_checkpoint_that_is_due_is_a_record_of_the_chain(tmp_path: Path, config: Config) -> None:
    """And the digests in it are those of the files."""
    engine, sparsifier = parts(config, steps=2)
    chain = Chain(tmp_path / "chain.jsonl")
    chain.start(0, format=1, config_digest="", settings={}, data={}, ranks=1, environment={})
    chain.note(7, {"train/loss": 0.5})
    window = torch.tensor([1.5, 0.5, 3.0], dtype=torch.float64)
    with checkpoints(tmp_path, config) as saving:
        for step in (7, 10):
            folder = saving.save(step, engine, sparsifier, tracker_run="", chain=chain, window=window)
            saving.finish()
    (record,) = [record for record in read_chain(tmp_path / "chain.jsonl") if record["kind"] == "checkpoint"]
    state = read_state(folder)
    assert record["step"] == 10
    assert {name: record[name] for name in ("shared", "ranks")} == digests_of(folder, state)
    assert state["chain"] == chain.position()  # after this record
    assert state["chain"]["pending"] == {"7": {"train/loss": 0.5}}
    start = checkpoints(tmp_path, config).load(*parts(config, steps=0), resume="auto")
    assert start.chain == chain.position() and start.window is not None
    assert start.window.tolist() == [1.5, 0.5, 3.0]


def test_the_average_of_the_weights_comes_back_or_starts_from_the_network(tmp_path: Path, config: Config) -> None:
    averaged = dataclasses.replace(config, train=dataclasses.replace(config.train, ema_decay=0.9))

    def resumed(start: Config, then: Config, *allowed: str) -> tuple[Engine, Engine]:
        folder = tmp_path / f"{start.train.ema_decay} {then.train.ema_decay}"
        engine, sparsifier = parts(start, steps=3)
        save(folder, start, 3, engine, sparsifier)
        again, sparsifier = parts(then, steps=0)
        checkpoints(folder, then).load(again, sparsifier, resume="auto", allowed_changes=allowed)
        return engine, again

    engine, again = resumed(averaged, averaged)
    assert engine.average is not None and again.average is not None
    before, after = engine.average.module.state_dict(), again.average.module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    network = engine.model.state_dict()
    assert {key for key in before if torch.equal(before[key], network[key])} == {
        key for key in before if key.endswith("num_batches_tracked")
    }
    with pytest.raises(ConfigError, match=r"train.ema_decay: 0.0 -> 0.9"):
        resumed(config, averaged)
    engine, again = resumed(config, averaged, "train.ema_decay")
    assert again.average is not None
    after = again.average.module.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in engine.model.state_dict().items())
    resumed(averaged, config, "train.ema_decay")


def test_what_the_best_state_is_chosen_by_is_compared_on_resume(tmp_path: Path, config: Config) -> None:
    def choosing(every: str, held_out: str = "h1", select: str = "best") -> Checkpoints:
        tickets = dataclasses.replace(config.tickets, select=select)
        evaluation = dataclasses.replace(config.evaluation, every=every)
        changed = dataclasses.replace(config, tickets=tickets, evaluation=evaluation)
        return Checkpoints(
            tmp_path,
            changed,
            build_plan(config, steps_per_epoch=100),
            data_digest="d1",
            best=BestTicket(held_out if select != "last" else ""),
        )

    engine, sparsifier = parts(config, steps=1)
    with choosing("5 steps") as saving:
        saving.best.keep(0.75, 10, b"a ticket")
        saving.save(10, engine, sparsifier, tracker_run="")
    again = choosing("5 steps")
    again.load(engine, sparsifier, resume="auto")
    assert again.best == saving.best
    for other, what in (
        (choosing("6 steps"), r"evaluation.every: 5 steps -> 6 steps"),
        (choosing("5 steps", "h2"), r"the images or labels of evaluation.held_out: h1 -> h2"),
        (choosing("6 steps", select="last"), r"checkpoint: tickets.select: best -> last; do"),
    ):
        with pytest.raises(ConfigError, match=what):
            other.load(engine, sparsifier, resume="auto")


def test_a_tie_keeps_the_first_state_and_fewer_active_weights_come_first() -> None:
    best = BestTicket("h1")
    assert best.is_beaten_by(0.0, 10)
    best.keep(0.5, 10, b"")
    assert [best.is_beaten_by(*state) for state in ((0.5, 10), (0.51, 10), (0.4, 9), (0.9, 11))] == [
        False, True, True, False
    ]  # fmt: skip


def test_the_sparsifiers_dense_tensors_come_back(tmp_path: Path, config: Config) -> None:
    engine, sparsifier = parts(config, steps=2, method="snfs")
    save(tmp_path, config, 2, engine, sparsifier)
    engine2, sparsifier2 = parts(config, steps=0, method="snfs")
    assert not any(average.any() for average in sparsifier2.tensors().values())
    checkpoints(tmp_path, config).load(engine2, sparsifier2, resume="auto")
    before, after = sparsifier.tensors(), sparsifier2.tensors()
    assert before.keys() == after.keys()
    assert len(before) == len(sparsifier.masks)  # SNFS's moving average of each layer
    assert all(torch.equal(before[key], after[key]) and before[key].any() for key in before)


def test_no_checkpoint_is_step_0_and_secrets_stay_out(tmp_path: Path, config: Config) -> None:
    engine, sparsifier = parts(config, steps=1)
    assert checkpoints(tmp_path, config).load(engine, sparsifier, resume="auto").step == 0
    folder = save(tmp_path, config, 1, engine, sparsifier)
    assert "hunter2" not in (folder / "state.json").read_text()


@pytest.mark.parametrize("name", ["state.safetensors", "rank-0.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, config: Config, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine, sparsifier = parts(config, steps=1)
    for step in (10, 20):
        newest = save(tmp_path, config, step, engine, sparsifier)
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert checkpoints(tmp_path, config).load(engine, sparsifier, resume="auto").step == 10
    assert "step-00000020" in caplog.text
    (tmp_path / "step-00000010" / "manifest.json").write_text(json.dumps({"files": {}}))
    with pytest.raises(IntegrityError, match="no valid checkpoint"):  # never a silent restart from 0
        checkpoints(tmp_path, config).load(engine, sparsifier, resume="auto")


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, WriteError), (errno.ESTALE, WriteError), (errno.EACCES, PermissionDenied)]
)
def test_a_newest_checkpoint_that_cannot_be_read_now_is_not_skipped(
    tmp_path: Path, config: Config, number: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be valid, and the next save would remove it."""
    engine, sparsifier = parts(config, steps=1)
    for step in (10, 20):
        save(tmp_path, config, step, engine, sparsifier)

    def failing(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(verify, "sha256_of", failing)
    with pytest.raises(kind, match=r"step-00000020/\S+: .*" + os.strerror(number)):
        checkpoints(tmp_path, config).load(engine, sparsifier, resume="auto")
    monkeypatch.undo()
    (tmp_path / "step-00000020" / "rank-0.safetensors").unlink()  # gone for good
    assert checkpoints(tmp_path, config).load(engine, sparsifier, resume="auto").step == 10


def test_the_newest_up_to_the_saved_step_are_kept(tmp_path: Path, config: Config) -> None:
    engine, sparsifier = parts(config, steps=1)
    for step in (10, 20, 30, 100, 40):  # 100 is from an abandoned run
        save(tmp_path, config, step, engine, sparsifier)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000030", "step-00000040"]


def test_another_configuration_or_other_data_is_refused_and_incidental_keys_are_not(
    tmp_path: Path, config: Config
) -> None:
    engine, sparsifier = parts(config, steps=1)
    save(tmp_path, config, 10, engine, sparsifier)
    other = dataclasses.replace(config, seed=5)
    with pytest.raises(ConfigError, match=r"seed: 0 -> 5"):
        checkpoints(tmp_path, other).load(engine, sparsifier, resume="auto")
    with pytest.raises(ConfigError, match=r"images or labels of data.train: d1 -> d2"):
        checkpoints(tmp_path, config, data_digest="d2").load(engine, sparsifier, resume="auto")
    moved = dataclasses.replace(config, output_dir="elsewhere")
    assert checkpoints(tmp_path, moved).load(engine, sparsifier, resume=str(tmp_path / "step-00000010")).step == 10


def test_a_resume_across_a_change_of_arithmetic_says_that_it_is_not_bit_exact(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, sparsifier = parts(config, steps=1)

    def resumed() -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            checkpoints(tmp_path, config).load(engine, sparsifier, resume="auto")
        return caplog.text

    save(tmp_path, config, 10, engine, sparsifier)
    assert "bit-exact" not in resumed()
    today = arithmetic.CHANGES
    with monkeypatch.context() as later:
        later.setattr(arithmetic, "CHANGES", (*today, "scores are summed in float64"))
        assert "resume is not bit-exact: scores are summed in float64" in resumed()
        save(tmp_path, config, 20, engine, sparsifier)
        assert "bit-exact" not in resumed()
        later.setattr(arithmetic, "CHANGES", (*today, "scores are summed in float64", "ties go to the lower index"))
        assert "resume is not bit-exact: ties go to the lower index" in resumed()
    assert "by a newer version of this project" in resumed()


def test_a_checkpoint_follows_every_interval_and_every_ticket(tmp_path: Path, config: Config) -> None:
    due = [step + 1 for step in range(700) if checkpoints(tmp_path, config).is_due(step)]
    assert due == sorted({*range(10, 701, 10), 400, 500, 600, 700})


def test_file_times_do_not_matter(tmp_path: Path, config: Config) -> None:
    engine, sparsifier = parts(config, steps=1)
    for age, step in enumerate((10, 20)):
        folder = save(tmp_path, config, step, engine, sparsifier)
        for path in (folder, *folder.iterdir()):
            os.utime(path, (2e9 - 1e8 * age, 2e9 - 1e8 * age))  # the clock has jumped back
    assert checkpoints(tmp_path, config).load(engine, sparsifier, resume="auto").step == 20


def test_leftovers_of_kills_are_not_used_and_are_removed(tmp_path: Path, config: Config) -> None:
    engine, sparsifier = parts(config, steps=1)
    save(tmp_path, config, 10, engine, sparsifier)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / ".step-00000020.0123abcd.partial")
    assert checkpoints(tmp_path, config).load(engine, sparsifier, resume="auto").step == 10
    save(tmp_path, config, 20, engine, sparsifier)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


def test_training_does_not_wait_for_the_disk_and_changes_nothing_that_is_saved(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write = threading.Event(), writer.write_atomically

    def wait_and_write(path: Path, content: bytes, **how: Any) -> None:
        assert may_write.wait(60)
        write(path, content, **how)

    monkeypatch.setattr(writer, "write_atomically", wait_and_write)
    engine, sparsifier = parts(config, steps=2, method="snfs")
    expected = [tensor.clone() for tensor in state_of(engine, sparsifier)]
    happened: list[str] = []
    with checkpoints(tmp_path, config) as saving:
        folder = saving.save(
            10, engine, sparsifier, tracker_run="", after=lambda: happened.append(f"{folder.exists()}")
        )
        with torch.no_grad():  # training continues
            for tensor in state_of(engine, sparsifier):
                tensor.zero_()
        assert not folder.exists()
        may_write.set()
    assert happened == ["False"]  # what must be on the disk before it was waited for
    engine, sparsifier = parts(config, steps=0, method="snfs")
    checkpoints(tmp_path, config).load(engine, sparsifier, resume="auto")
    assert all(torch.equal(a, b) for a, b in zip(state_of(engine, sparsifier), expected, strict=True))


def test_the_folder_is_named_only_when_no_thread_needs_its_old_name(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread still syncs the folder after its last file while another one publishes it.

    Found by ``python -m tests.campaigns.resume``.
    """
    sync = files.sync_folder

    def slow_sync(folder: Path) -> None:
        time.sleep(0.2)
        sync(folder)

    monkeypatch.setattr(files, "sync_folder", slow_sync)
    engine, sparsifier = parts(config, steps=1)
    assert save(tmp_path, config, 10, engine, sparsifier).is_dir()


def test_an_error_of_the_background_surfaces_and_the_one_before_stays(tmp_path: Path, config: Config) -> None:
    engine, sparsifier = parts(config, steps=1)
    save(tmp_path, config, 10, engine, sparsifier)

    def fail() -> None:
        raise WriteError("the ticket could not be saved")

    saving = checkpoints(tmp_path, config)
    saving.save(20, engine, sparsifier, tracker_run="", after=fail)
    with pytest.raises(WriteError, match="the ticket could not be saved"):
        saving.finish()
    with pytest.raises(KeyError), saving:  # the error of the block is raised, and the write is completed
        saving.save(30, engine, sparsifier, tracker_run="")
        raise KeyError
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000010", "step-00000030"]


def test_a_file_that_another_rank_wrote_elsewhere_is_named_after_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHARED_SECONDS", 0.1)
    writing = writer.BackgroundWriter()
    names = [f"rank-{rank}.safetensors" for rank in range(3)]
    writing.start(tmp_path / "new", {names[0]: lambda: b""}, all_files=names, publish=lambda: None)
    with pytest.raises(
        WriteError,
        match=r"rank-1\.safetensors: was written by its rank but is not visible on rank 0; do: output_dir must be on",
    ):
        writing.finish()


def test_a_folder_that_is_not_rank_0s_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "SHARED_SECONDS", 0.1)
    record = tmp_path / "run.json"
    missing = run_folder._not_shared(tmp_path, "demo-1")
    record.write_text('{"run_id": "demo-2"}')
    other = run_folder._not_shared(tmp_path, "demo-1")
    for error in (missing, other):
        assert error is not None and "was written by rank 0 but is not visible on rank" in error.what
    assert run_folder._not_shared(tmp_path, "demo-2") is None
