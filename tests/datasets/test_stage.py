"""Staged copies are whole or absent.

Two processes make them once; they are continued after a kill; they never replace another data set.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_prep.images import ImageOptions
from launchers.ending import ending
from pipeline.config.load import load_config
from pipeline.config.schema import DataConfig
from pipeline.datasets import stage as staging
from pipeline.datasets.sets import data_digest, open_data_sets
from pipeline.datasets.sidecar import BetonInfo, sidecar_path, verify
from pipeline.datasets.stage import stage
from pipeline.errors import DataError, PermissionDenied, WriteError


class Noise:
    """60 images of 384×384 random pixels: 4 pages of 8 MiB."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.random.default_rng((self.seed, index)).integers(0, 256, (384, 384, 3), dtype=np.uint8), index % 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> BetonInfo:
    return write(tmp_path_factory.mktemp("shared storage"))


def write(folder: Path, seed: int = 0, *, num_workers: int = 1) -> BetonInfo:
    from data_prep.writer import write_beton

    return write_beton(
        folder / "train.beton",
        Noise(seed),
        classes=["a", "b", "c"],
        options=ImageOptions(),
        source={},
        num_workers=num_workers,
        chunk_size=60 // num_workers,
    )


@pytest.fixture(scope="module")
def rewritten(source: BetonInfo) -> BetonInfo:
    """Write the same images and labels with two workers, so that they lie elsewhere in the file."""
    return write(source.path.parent / "rewritten", num_workers=2)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 1]))


def test_a_copy_is_equal_and_made_once(source: BetonInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o002)
    try:
        copy = stage(source.path, tmp_path)
    finally:
        os.umask(before)
    assert copy.path.stat().st_mode & 0o777 == 0o664  # a group shares it
    assert copy.path == tmp_path / "train.beton"
    assert copy.path.read_bytes() == source.path.read_bytes()
    assert sidecar_path(copy.path).read_bytes() == sidecar_path(source.path).read_bytes()
    assert names(tmp_path) == [".train.beton.lock", "train.beton", "train.beton.json"]
    monkeypatch.setattr(staging, "_copy", lambda *_: pytest.fail("copied again"))
    assert stage(source.path, tmp_path).digest == source.digest
    assert stage(source.path, source.path.parent).path == source.path  # it is where it is to be


def test_a_damaged_copy_is_made_again(source: BetonInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = stage(source.path, tmp_path).path
    os.truncate(copy, 1000)
    stage(source.path, tmp_path)
    flip_byte(copy, copy.stat().st_size // 2)  # a pixel: seen at level 2 only
    stage(source.path, tmp_path)
    with pytest.raises(DataError):
        verify(copy, level=2)
    stage(source.path, tmp_path, level=2)
    verify(copy, level=2)
    assert caplog.text.count("copying again") == 2


def test_a_damaged_source_is_refused_by_page(source: BetonInfo, tmp_path: Path) -> None:
    bad = tmp_path / "bad" / "train.beton"
    bad.parent.mkdir()
    bad.write_bytes(source.path.read_bytes())
    sidecar_path(bad).write_bytes(sidecar_path(source.path).read_bytes())
    flip_byte(bad, bad.stat().st_size // 2)
    with pytest.raises(DataError, match=r"bad/train.beton: page 1 is damaged"):
        stage(bad, tmp_path / "local")
    assert not (tmp_path / "local" / "train.beton").exists()


def test_another_set_of_the_same_name_is_not_replaced(source: BetonInfo, tmp_path: Path) -> None:
    other = write(tmp_path, seed=1)
    with pytest.raises(DataError, match="already exists and is not a copy of"):
        stage(source.path, tmp_path)
    assert verify(other.path, level=2).digest == other.digest


STAGE = (
    "import sys; from data_prep.__main__ import main; sys.exit(main(['stage', sys.argv[1], '--output', sys.argv[2]]))"
)
# each page takes some time to read: the first process is still at it when the others come
SLOW = (
    "import time; from pipeline.data import stage as s; read, seconds = s._read, [{}]\n"
    "def slowly(*a):\n    print('reads', a[3], flush=True)\n"
    "    time.sleep(seconds.pop(0) if seconds else 0.2)\n    return read(*a)\n"
    "s._read, s.NUM_READERS = slowly, 1\n"
)


def test_killed_copies_are_taken_up_and_two_processes_do_it_once(source: BetonInfo, tmp_path: Path) -> None:
    def command(seconds: str) -> list[str]:
        return [sys.executable, "-c", SLOW.format(seconds) + STAGE, str(source.path), str(tmp_path)]

    with subprocess.Popen(command("0, 0, 60"), stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        for _ in range(3):  # two pages are written, and the third is begun
            assert first.stdout.readline().startswith("reads")
        first.send_signal(signal.SIGKILL)
    assert names(tmp_path) == [".train.beton.lock", ".train.beton.staging"]

    jobs = [subprocess.Popen(command(""), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [job.communicate(timeout=60) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    reads = [line for out, _ in outputs for line in out.splitlines() if line.startswith("reads")]
    num_kept = 2
    assert len(reads) == 4 - num_kept + 2  # what was missing and the two tables, by one of both
    assert sum("being staged by another process" in err for _, err in outputs) <= 1
    assert verify(tmp_path / "train.beton", level=2).digest == source.digest
    assert names(tmp_path) == [".train.beton.lock", "train.beton", "train.beton.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
def test_a_full_disk_is_left_as_it_was(source: BetonInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(tmp_path)], check=True)
    try:
        with pytest.raises(WriteError, match=r"needs 40 MiB more, but 20 MiB are free"):
            stage(source.path, tmp_path)
        monkeypatch.setattr(
            staging.shutil, "disk_usage", lambda _: os.terminal_size((1, 1)) and type("Usage", (), {"free": 1 << 40})
        )
        with pytest.raises(WriteError, match=r"train.beton: no space: "):  # somebody else filled it meanwhile
            stage(source.path, tmp_path)
        assert names(tmp_path) == [".train.beton.lock"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_a_folder_that_may_not_be_written(source: BetonInfo, tmp_path: Path) -> None:
    def as_nobody() -> None:
        os.chdir(source.path.parent)  # below folders that only root may enter
        os.setuid(65534)
        try:
            stage("train.beton", Path("local"))
        except PermissionDenied as error:
            os._exit(error.code if "user id 65534" in str(error) else 1)

    child = multiprocessing.get_context("fork").Process(target=as_nobody)
    child.start()
    child.join(20)
    assert child.exitcode == PermissionDenied.code
    assert names(source.path.parent) == ["train.beton", "train.beton.json"]


def test_the_training_configuration_stages_by_content(
    source: BetonInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other", seed=1)
    overrides = [f"data.train={source.path}", f"data.val={other.path}", f"data.stage={tmp_path / 'local'}"]
    config = load_config("fashion_mnist_s90", overrides)
    for _ in range(2):  # the second finds both
        sets = open_data_sets(config)
        assert sets.train is not None and sets.held_out is None
        assert sets.train.path == tmp_path / "local" / source.file_digest[:16] / "train.beton"
        assert verify(sets.val.path, level=2).digest == other.digest == sets.val.digest
    assert open_data_sets(load_config("fashion_mnist_s90", overrides[:2])).train == source

    sidecar_path(other.path).unlink()
    for rank, local_rank, is_reported in (
        ("0", "0", True),
        ("8", "0", True),
        ("9", "1", False),
    ):  # one rank of each node reports it
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with ending() as end:
            open_data_sets(config)
        assert end.code == 65
        assert ("has no sidecar" in capsys.readouterr().err) == is_reported


def test_a_set_that_was_written_anew_is_staged_beside_its_old_copy(
    source: BetonInfo, rewritten: BetonInfo, tmp_path: Path
) -> None:
    assert rewritten.digest == source.digest
    for info in (source, rewritten, source):
        config = load_config(
            "fashion_mnist_s90", [f"data.train={info.path}", f"data.val={info.path}", f"data.stage={tmp_path}"]
        )
        assert open_data_sets(config).val.path.read_bytes() == info.path.read_bytes()
    assert len(names(tmp_path)) == 2


def test_waiting_is_reported(source: BetonInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder = os.fork()
    if holder == 0:
        with staging._locked(tmp_path, "train.beton"):
            (tmp_path / "held").touch()
            deadline = time.monotonic() + 60
            while not (tmp_path / "release").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(1) as pool:
        staged_copy = pool.submit(stage, source.path, tmp_path)
        deadline = time.monotonic() + 20
        while "being staged by another process, waiting for it" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        is_waiting = not staged_copy.done()
        (tmp_path / "release").touch()
        assert staged_copy.result(20).digest == source.digest
    os.waitpid(holder, 0)
    assert is_waiting
    assert "being staged by another process, waiting for it" in caplog.text


def test_with_pages_in_order_the_digest_of_the_data_knows_where_images_lie(
    source: BetonInfo, rewritten: BetonInfo
) -> None:
    for order, is_same in (("random", True), ("quasi_random", False)):
        data = DataConfig(order=order)
        assert (data_digest(source, data) == data_digest(rewritten, data)) == is_same
