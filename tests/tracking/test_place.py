"""Where records go: which setting decides, on which file system, and under which address."""

from __future__ import annotations

import re
import shlex
import socket
from pathlib import Path

import pytest

from pipeline.config.schema import TrackingConfig
from pipeline.errors import ConfigError
from pipeline.tracking.address import check_address, sqlite_path, sqlite_uri
from pipeline.tracking.mounts import file_system, network_file_system
from pipeline.tracking.place import check_place, default_database, find_run, free_ui_port, how_to_open, where

NOTHING = TrackingConfig()


def test_the_configuration_comes_before_the_variables_and_these_before_the_shared_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "a"
    place = where(run, NOTHING)
    assert (place.uri, place.experiment, place.run_id) == (f"sqlite:///{tmp_path}/runs/mlflow.db", "ticketworks", "")
    assert place.shown == f"MLflow: {place.uri}, experiment ticketworks: the runs side by side share it"
    assert where(tmp_path / "runs" / "b", NOTHING).uri == place.uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@host:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123abc")
    place = where(run, NOTHING)
    assert (place.uri, place.experiment, place.run_id) == ("http://me:hunter2@host:5000", "theirs", "0123abc")
    assert "MLFLOW_TRACKING_URI is set" in place.shown and "0123abc" in place.shown and "hunter2" not in place.shown
    place = where(run, TrackingConfig(uri="http://ours:5000", experiment="ours"))
    assert (place.uri, place.experiment, place.setting) == ("http://ours:5000", "ours", "tracking.uri")
    monkeypatch.setenv("TICKETWORKS_PARENT_RUN", "0123abc")
    assert where(run, NOTHING).run_id == ""  # the members of a sweep are runs of their own
    assert not (tmp_path / "runs").exists()  # deciding creates nothing


def test_a_database_of_before_stays_the_runs_own(tmp_path: Path) -> None:
    (tmp_path / "a" / "report").mkdir(parents=True)
    (tmp_path / "a" / "mlflow.db").touch()
    (tmp_path / "a" / "run.json").touch()
    assert where(tmp_path / "a", NOTHING).uri == f"sqlite:///{tmp_path}/a/mlflow.db"
    assert where(tmp_path / "b", NOTHING).uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert where(tmp_path / "a" / "judged", NOTHING).uri == f"sqlite:///{tmp_path}/a/mlflow.db"  # with its run
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").touch()
    # a database in the folder of run b would count as its own when it is resumed
    assert where(tmp_path / "b" / "judged", NOTHING).uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_folder_of_all_users_is_not_shared(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    database, reason = default_database(tmp_path / "a")
    assert database == tmp_path / "a" / "mlflow.db"
    assert "is a folder of all users" in reason


MOUNTS = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:25 / /home rw,relatime shared:7 - nfs4 server:/home rw,vers=4.2
31 22 0:26 / /scratch rw - lustre 10.0.0.1@tcp:/scratch rw
32 22 0:27 / /my\040data rw,relatime - cifs //server/data rw
33 30 0:28 / /home/me/local rw - xfs /dev/sdb1 rw
34 22 0:29 / /covered rw - nfs server:/old rw
35 22 0:30 / /covered rw - ext4 /dev/sdc1 rw
36 22 0:31 / /bucket rw master:3 propagate_from:1 - fuse.s3fs s3fs rw
37 22 0:32 / /fused rw - fuse.sshfs me@host:/ rw
a damaged line
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/runs", "nfs4"),
        ("/home/me/local/runs", ""),
        ("/homestead/runs", ""),
        ("/scratch", "lustre"),
        ("/my data/runs", "cifs"),
        ("/covered/runs", ""),
        ("/bucket/a", "fuse.s3fs"),
        ("/fused/a", "fuse.sshfs"),
        ("/srv", ""),
    ],
)
def test_network_storage_is_asked_of_the_mount(path: str, kind: str, tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS)
    assert network_file_system(Path(path), mounts=table) == kind
    assert network_file_system(Path(path), mounts=tmp_path / "missing") == ""


def test_the_mounts_of_this_machine() -> None:
    assert file_system(Path("/proc/self")) == "proc"


def test_on_network_storage_a_run_has_its_own_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(f"22 1 254:0 / / rw - ext4 /dev/root rw\n30 22 0:25 / {tmp_path} rw - nfs4 server:/x rw\n")
    monkeypatch.setattr("pipeline.tracking.mounts.MOUNTS", table)
    database, reason = default_database(tmp_path / "runs" / "a")
    assert database == tmp_path / "runs" / "a" / "mlflow.db"
    assert "network storage (nfs4)" in reason


NAMES = ("a b", "what?", "50%", "a%20b", "a%3Fb", "c#", "a&b=c", "grün ☃", "a:b@c", "it's", "+;,$", "a?b#c%d")


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_the_same_after_the_way_through_an_address(name: str, tmp_path: Path) -> None:
    from sqlalchemy.engine import make_url

    database = tmp_path / name / "mlflow.db"
    uri = sqlite_uri(database)
    assert sqlite_path(uri) == database
    assert make_url(uri).database == str(database)  # and SQLAlchemy opens this one


def test_an_older_sqlalchemy_takes_a_path_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.address.metadata.version", lambda _: "2.0.36")
    database = tmp_path / "a%20b#c" / "mlflow.db"
    assert sqlite_uri(database) == f"sqlite:///{database}"
    assert sqlite_path(sqlite_uri(database)) == database
    with pytest.raises(ConfigError, match="cannot open a path with a question mark"):
        sqlite_uri(tmp_path / "what?" / "mlflow.db")


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        (
            "postgresql+psycopg2://me:hunter2@host/mlflow",
            r"the driver psycopg2 is not installed.*pip install psycopg2-bin",
        ),
        ("mysql://me@host/mlflow", "the driver mysqldb is not installed.*pip install mysqlclient"),
        ("mssql+nothing://me@host/mlflow", "no driver 'nothing' is installed for mssql"),
        ("postgresql://me@host:port/mlflow", "the port is not a number; do: write postgresql://HOST:5432/NAME"),
        ("postgres://me@host/mlflow", "has no store for postgres://; do: write postgresql://"),
        ("mongodb://host/mlflow", "has no store for mongodb://; do: use one of http, https"),
        ("file:///mnt/mlruns", "MLflow no longer opens a file store"),
        ("sqlite:///:memory:", "an in-memory database"),
    ],
)
def test_an_address_that_mlflow_cannot_open_is_refused(uri: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        check_address(uri, setting="tracking.uri")
    assert str(caught.value).startswith("tracking.uri=") and "hunter2" not in str(caught.value)


def test_addresses_that_may_work_are_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for uri in ("http://nobody:5000", "https://nobody/x", "databricks", f"sqlite:///{tmp_path}/new/m.db", "file:///m"):
        check_address(uri, setting="tracking.uri")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_hold_a_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in ("file/mlflow.db", "folder", "x" * 300):
        with pytest.raises(ConfigError, match=r"tracking\.uri=sqlite:"):
            check_address(f"sqlite:///{tmp_path / path}", setting="tracking.uri")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("MLFLOW_TRACKING_URI", "mlruns", "MLFLOW_TRACKING_URI: expected a URI, got 'mlruns'"),
        ("MLFLOW_TRACKING_URI", "host:5000", "did you mean 'http://host:5000'"),
        ("MLFLOW_TRACKING_URI", "http://:5000", "MLFLOW_TRACKING_URI: has no host name"),
        ("MLFLOW_TRACKING_URI", "mysql://h/db", "MLFLOW_TRACKING_URI=mysql://h/db: the driver"),
        ("MLFLOW_TRACKING_URI", "sqlite:///~/m.db", "MLFLOW_TRACKING_URI: contains ~, which is not expanded in a URL"),
        ("MLFLOW_TRACKING_URI", "sqlite:////$HOME/m.db", r"MLFLOW_TRACKING_URI: contains \$HOME, but"),
        ("MLFLOW_RUN_ID", "a'b", "is not a valid MLflow run ID"),
    ],
)
def test_a_bad_variable_is_named(
    name: str, value: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=problem):
        check_place(where(tmp_path / "a", NOTHING))


def test_no_run_is_found_where_nothing_was_sent(tmp_path: Path) -> None:
    assert find_run(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_the_command_that_opens_a_store_is_quoted_and_leaves_no_folder_behind(tmp_path: Path) -> None:
    def words(folder: str) -> list[str]:
        command, _, comment = how_to_open(sqlite_uri(tmp_path / folder / "mlflow.db")).partition("  # ")
        assert re.fullmatch(r"then open http://127\.0\.0\.1:50\d\d", comment)
        return shlex.split(command)

    given = words("a b")
    assert given[given.index("--backend-store-uri") + 1] == f"sqlite:///{tmp_path}/a b/mlflow.db"
    assert given[-2] == "--port"
    given = words("it's?")
    assert given[:3] == ["cd", f"{tmp_path}/it's?", "&&"]
    assert given[given.index("--backend-store-uri") + 1] == "sqlite:///mlflow.db"
    assert how_to_open("http://me:hunter2@host:5000") == "http://me:[redacted]@host:5000"
    assert how_to_open("http://host:5000/") == "http://host:5000"
    page = "/#/experiments/7?workflowType=machine_learning"
    assert how_to_open("http://host:5000", experiment_id="7") == f"http://host:5000{page}"
    assert how_to_open(f"sqlite:///{tmp_path}/mlflow.db", experiment_id="7").endswith(page)


def test_a_port_that_is_taken_is_not_offered() -> None:
    with socket.socket() as taken:
        port = free_ui_port()
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert free_ui_port() != port
