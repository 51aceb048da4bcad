"""SQLite stores that several runs share: made and written by processes at once, damaged, replaced, moved."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import TrackingConfig
from pipeline.errors import ServiceError
from pipeline.tracking import open_tracker, spooled, store
from pipeline.tracking.address import sqlite_uri
from pipeline.tracking.place import find_run, where
from pipeline.tracking.spooled import replay

CONFIG = TrackingConfig(backend="mlflow", experiment="unit", required=True)
FORK = multiprocessing.get_context("fork")  # a process that has mlflow already


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    store.import_mlflow()
    from mlflow.store.tracking import sqlalchemy_store  # noqa: F401


def track(folder: Path, *, steps: range = range(20), config: TrackingConfig = CONFIG, **options: Any) -> str:
    """Report a small run with an artifact and a child; return its id in MLflow."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.txt").write_text(folder.name)
    with open_tracker(config, output_dir=folder, run_name=folder.name, **options) as tracker:
        for step in steps:
            tracker.log_metrics({"train/loss": 1 / (step + 1)}, step=step)
        tracker.log_child("ticket-0", {}, {"eval/top1": 0.9})
        tracker.log_artifact(folder / "table.txt")
    return tracker.run_id


def rows(database: Path, query: str, *values: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute(query, values).fetchall()


def steps_of(database: Path, run_id: str) -> list[int]:
    found = rows(database, "SELECT step FROM metrics WHERE run_uuid = ? AND key = 'train/loss' ORDER BY step", run_id)
    return [step for (step,) in found]


def artifacts_of(database: Path, run_id: str) -> str:
    ((uri,),) = rows(database, "SELECT artifact_uri FROM runs WHERE run_uuid = ?", run_id)
    return str(uri)


def at_once(jobs: list[Callable[[], object]]) -> None:
    """Run the jobs in a process each, started together; a job that fails or warns fails the test."""
    barrier = FORK.Barrier(len(jobs))

    def run(job: Callable[[], object]) -> None:
        warnings: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("pipeline").addHandler(handler)
        barrier.wait(timeout=60)
        job()
        assert not warnings, warnings

    processes = [FORK.Process(target=run, args=(job,)) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * len(jobs)


def test_runs_that_start_at_once_make_one_database_and_all_write_to_it(tmp_path: Path) -> None:
    names = ("a", "b", "c", "d")
    at_once([lambda name=name: track(tmp_path / name, steps=range(100)) for name in names])  # type: ignore[misc]
    database = tmp_path / "mlflow.db"
    for name in names:
        found = find_run(tmp_path / name)
        assert found is not None and found.uri == f"sqlite:///{database}"
        assert steps_of(database, found.run_id) == list(range(100))
        copied = tmp_path / "mlartifacts" / found.run_id / "artifacts" / "table.txt"
        assert copied.read_text() == name
        sent = json.loads((tmp_path / name / "metrics.sent.json").read_text())
        assert sent["num_bytes"] == (tmp_path / name / "metrics.jsonl").stat().st_size
    assert rows(database, "SELECT count(*) FROM runs") == [(2 * len(names),)]
    assert rows(database, "SELECT count(*) FROM experiments WHERE name = 'unit'") == [(1,)]
    assert rows(database, "PRAGMA integrity_check") == [("ok",)]
    umask = os.umask(0)
    os.umask(umask)
    assert database.stat().st_mode & 0o777 == 0o666 & ~umask
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".mlflow.db.lock", "a", "b", "c", "d", "mlartifacts", "mlflow.db"
    ]  # fmt: skip


def test_a_process_that_is_killed_while_it_makes_the_database_leaves_none(tmp_path: Path) -> None:
    def killed() -> None:
        Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]
        with store.only_writer(tmp_path / "mlflow.db"):
            store.prepare_database(tmp_path / "mlflow.db")

    process = FORK.Process(target=killed)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / ".mlflow.db.new").exists() and not (tmp_path / "mlflow.db").exists()
    assert steps_of(tmp_path / "mlflow.db", track(tmp_path / "a")) == list(range(20))
    assert not (tmp_path / ".mlflow.db.new").exists()


def older_database(database: Path) -> None:
    """Write a store as an older version of MLflow made it, which lacks tables of today."""
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db import utils
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    engine = create_engine("sqlite:///:memory:")
    Base.metadata.create_all(engine)
    config = utils._get_alembic_config("sqlite://")
    revisions = [each.revision for each in ScriptDirectory.from_config(config).walk_revisions()]  # newest first
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revisions[12])
    raw = engine.raw_connection()
    with contextlib.closing(sqlite3.connect(database)) as saved:
        raw.driver_connection.backup(saved)  # type: ignore[union-attr]
    raw.close()
    assert not utils._all_tables_exist(engine)


def test_runs_that_start_at_once_migrate_an_older_database_once(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    older_database(database)
    at_once([lambda name=name: track(tmp_path / name) for name in ("a", "b")])  # type: ignore[misc]
    for name in ("a", "b"):
        found = find_run(tmp_path / name)
        assert found is not None and steps_of(database, found.run_id) == list(range(20))


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and the shared database, to be copied."""
    folder = tmp_path_factory.mktemp("used")
    track(folder / "a")
    return folder


@pytest.fixture
def runs(used: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    shutil.copytree(used, folder)
    sent = folder / "a" / "metrics.sent.json"
    sent.write_text(sent.read_text().replace(str(used), str(folder)))
    return folder


def random_bytes(database: Path) -> None:
    database.write_bytes(os.urandom(4000))


def cut_off(database: Path) -> None:
    os.truncate(database, database.stat().st_size // 2)


def of_another_program(database: Path) -> None:
    database.unlink()
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE bookmarks (title TEXT)")


def a_folder(database: Path) -> None:
    database.unlink()
    database.mkdir()


def deleted_experiment(database: Path) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE experiments SET lifecycle_stage = 'deleted' WHERE name = 'unit'")


def other_schema(database: Path) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'f5a4f2784254'")


FAULTS = [
    (random_bytes, "not a database", "move {database} away"),
    (cut_off, "malformed", "move {database} away"),
    (of_another_program, "another program's database", "set tracking.uri"),
    (deleted_experiment, "experiment 'unit' was deleted", "mlflow experiments restore"),
    (other_schema, "out-of-date database schema", "mlflow db upgrade"),
]


@pytest.mark.parametrize(("fault", "problem", "do"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS])
def test_a_store_that_cannot_be_opened_is_an_outage(
    fault: Callable[[Path], None], problem: str, do: str, runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = runs / "mlflow.db"
    fault(database)
    started = time.monotonic()
    track(runs / "b", config=TrackingConfig(backend="mlflow", experiment="unit"))
    assert time.monotonic() - started < 5
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2, warnings  # the outage, and what was not sent
    assert problem in warnings[0] and do.format(database=database) in warnings[0], warnings[0]
    assert "training continues" in warnings[0] and "24 records have not reached MLflow" in warnings[1]
    with pytest.raises(ServiceError, match=problem) as caught:
        track(runs / "c")
    assert do.format(database=database) in caught.value.do and caught.value.code == 69


def test_what_the_import_raises_is_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ModuleNotFoundError("No module named 'sqlalchemy'")

    monkeypatch.setattr(store, "import_mlflow", broken)
    track(tmp_path / "a", config=TrackingConfig(backend="mlflow"))
    assert "(No module named 'sqlalchemy'): training continues" in caplog.records[0].getMessage()
    with pytest.raises(ServiceError, match="No module named 'sqlalchemy'; do: install the package with pip"):
        track(tmp_path / "b")


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield


def test_a_store_that_another_program_holds_delays_the_start_by_seconds(runs: Path) -> None:
    with locked(runs / "mlflow.db"):
        started = time.monotonic()
        with pytest.raises(ServiceError, match="no response in 5 s"):
            track(runs / "c")
        assert time.monotonic() - started < 8


def test_another_run_that_holds_the_store_is_named(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.2)
    with store.only_writer(runs / "mlflow.db"), pytest.raises(ServiceError, match="another run is writing to"):
        track(runs / "c")


def test_a_database_that_is_moved_away_is_replaced_by_one_with_all_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tracking.spooled.RETRY_SECONDS", (0.1, 0.1))
    database = tmp_path / "mlflow.db"
    with open_tracker(CONFIG, output_dir=tmp_path / "a", run_name="a") as tracker:
        for step in range(10):
            tracker.log_metrics({"train/loss": 1.0}, step=step)
        tracker.flush()
        before = tracker.run_id
        database.rename(tmp_path / "moved.db")
        for step in range(10, 20):
            tracker.log_metrics({"train/loss": 1.0}, step=step)
        tracker.flush()
        time.sleep(0.5)
        tracker.flush()
    assert tracker.run_id != before
    assert steps_of(tmp_path / "moved.db", before) == list(range(10))
    assert steps_of(database, tracker.run_id) == list(range(20))


def test_a_damaged_page_loses_no_record(runs: Path) -> None:
    """MLflow gives the errors of a damaged database the code of a record that it rejects."""
    found = find_run(runs / "a")
    assert found is not None
    intact = (runs / "mlflow.db").read_bytes()
    with (runs / "mlflow.db").open("r+b") as file:  # all pages but the first ones, which name the tables
        file.seek(len(intact) // 3)
        file.write(b"\xff" * (len(intact) // 2))
    config = TrackingConfig(backend="mlflow", experiment="unit")
    with open_tracker(config, output_dir=runs / "a", run_name="a", resume_run_id=found.run_id) as tracker:
        for step in range(20, 30):
            tracker.log_metrics({"train/loss": 1.0}, step=step)
    (runs / "mlflow.db").write_bytes(intact)
    replay(runs / "a")
    assert steps_of(runs / "mlflow.db", found.run_id) == list(range(30))


@pytest.mark.parametrize("name", ["what?", "50%20off # grün b"])
def test_nothing_lands_beside_a_folder_with_an_odd_name(
    name: str, used: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spooled, "START_SECONDS", 60)  # this is about places; a busy machine may be slower than 5 s
    folder = tmp_path / name / "own"
    folder.mkdir(parents=True)
    (folder / "mlflow.db").touch()  # its own database, and the shared one of the next run
    own = track(folder)
    shared = track(tmp_path / name / "shared")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert steps_of(folder / "mlflow.db", own) == steps_of(folder.parent / "mlflow.db", shared) == list(range(20))
    assert (folder / "mlartifacts" / own / "artifacts" / "table.txt").read_text() == "own"
    assert (folder.parent / "mlartifacts" / shared / "artifacts" / "table.txt").read_text() == "shared"


def test_a_run_that_was_moved_with_its_database_logs_artifacts_to_the_new_place(tmp_path: Path) -> None:
    old, new = tmp_path / "old #1", tmp_path / "moved to?"
    old.mkdir()
    (old / "mlflow.db").touch()
    at_once([lambda: track(old)])  # in a process of its own: MLflow remembers where the artifacts of a run are
    old.rename(new)
    found = find_run(new)
    assert found is not None and found.uri == sqlite_uri(new / "mlflow.db")
    run_id = found.run_id
    with open_tracker(CONFIG, output_dir=new, run_name="moved", resume_run_id=run_id) as tracker:
        (new / "late.txt").write_text("late")
        tracker.log_artifact(new / "late.txt")
    assert tracker.run_id == run_id
    artifacts = new / "mlartifacts" / run_id / "artifacts"
    assert sorted(path.name for path in artifacts.iterdir()) == ["late.txt", "table.txt"]
    assert artifacts_of(new / "mlflow.db", run_id) == artifacts.as_uri()
    assert not old.exists()


def test_artifacts_that_are_elsewhere_on_purpose_stay_there(runs: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "big" / "mlartifacts"
    elsewhere.mkdir(parents=True)
    shutil.rmtree(runs / "mlartifacts")
    with contextlib.closing(sqlite3.connect(runs / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE experiments SET artifact_location = ? WHERE name = 'unit'", (str(elsewhere),))
    run_id = track(runs / "b")
    assert (elsewhere / run_id / "artifacts" / "table.txt").exists()
    assert not (runs / "mlartifacts").exists()


def test_a_run_that_was_moved_alone_is_sent_to_the_database_beside_it(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    (runs / "a").rename(tmp_path / "others" / "a")
    assert replay(tmp_path / "others" / "a") == 0  # its database is still where it was, and has everything
    found = find_run(tmp_path / "others" / "a")
    assert found is not None and found.uri == f"sqlite:///{runs}/mlflow.db"
    shutil.rmtree(runs)
    replay(tmp_path / "others" / "a")
    found = find_run(tmp_path / "others" / "a")
    assert found is not None and found.uri == f"sqlite:///{tmp_path}/others/mlflow.db"
    assert steps_of(tmp_path / "others" / "mlflow.db", found.run_id) == list(range(20))


def test_a_copy_of_a_run_gets_a_run_of_its_own(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = find_run(runs / "a")
    assert original is not None
    shutil.copytree(runs / "a", runs / "b")
    config = TrackingConfig(backend="mlflow", experiment="unit")
    for first in (20, 25):  # the second time with the same checkpoint, which names the original
        with open_tracker(config, output_dir=runs / "b", run_name="b", resume_run_id=original.run_id) as tracker:
            tracker.resume_from(first)
            for step in range(first, first + 5):
                tracker.log_metrics({"train/loss": 1.0}, step=step)
    told = [record.getMessage() for record in caplog.records if "is a copy of" in record.getMessage()]
    assert told == [f"this folder is a copy of {runs}/a, so its records go to an MLflow run of its own"]
    own = find_run(runs / "b")
    assert own is not None and own.run_id == tracker.run_id != original.run_id
    assert steps_of(runs / "mlflow.db", original.run_id) == list(range(20))
    assert steps_of(runs / "mlflow.db", own.run_id) == list(range(30))
    with open_tracker(config, output_dir=runs / "a", run_name="a", resume_run_id=original.run_id) as tracker:
        pass
    assert tracker.run_id == original.run_id


def test_mlflows_variables_are_honoured(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    theirs = tmp_path / "theirs.db"
    shutil.copy(runs / "mlflow.db", theirs)
    client = MlflowClient(tracking_uri=f"sqlite:///{theirs}")
    created = client.create_run(client.create_experiment("theirs"), run_name="made by a scheduler").info.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{theirs}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    nothing = TrackingConfig(backend="mlflow", required=True)
    other = track(tmp_path / "x" / "a", config=nothing)
    assert client.get_experiment(client.get_run(other).info.experiment_id).name == "mine"
    monkeypatch.setenv("MLFLOW_RUN_ID", created)
    assert track(tmp_path / "x" / "b", config=nothing) == created
    assert client.get_run(created).info.run_name == "made by a scheduler"
    assert client.get_run(created).info.status == "FINISHED"
    children = client.search_runs([client.get_run(created).info.experiment_id], "tags.mlflow.parentRunId != ''")
    assert [child.data.tags["mlflow.parentRunId"] for child in children] == [created]
    assert track(tmp_path / "x" / "b", config=nothing, steps=range(20, 30)) == created  # started again
    # a run that is resumed continues its own
    assert track(tmp_path / "x" / "a", config=nothing, steps=range(20, 30), resume_run_id=other) == other
    assert steps_of(theirs, other) == steps_of(theirs, created) == list(range(30))
    assert not (tmp_path / "x" / "mlflow.db").exists()
    assert where(tmp_path / "x" / "a", nothing).run_id == created
