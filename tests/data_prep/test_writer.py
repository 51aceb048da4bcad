"""Writing ends with a whole file under its final name, or with one error and nothing left.

Workers and runs are killed, and disks are full.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from data_prep import writer
from data_prep.images import ImageOptions
from data_prep.workers import run_workers
from data_prep.writer import write_beton
from pipeline.datasets.beton_format import pages_start, read_tables
from pipeline.datasets.image_file import BadImage
from pipeline.datasets.sidecar import BetonInfo, verify
from pipeline.errors import DataError, PeerError, RunError, WriteError

SHARED_MEMORY = Path("/dev/shm")


class Images:
    """``count`` images of 256×256 zeros, label 0; ``before`` runs in the worker before each image."""

    def __init__(self, count: int, before: Callable[[int], None] = lambda _: None) -> None:
        self.count, self.before = count, before

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        self.before(index)
        return np.zeros((256, 256, 3), np.uint8), 0


def write(path: Path, images: Images, *, num_workers: int = 2, min_bytes: int = 0) -> BetonInfo:
    return write_beton(
        path,
        images,
        classes=["only"],
        options=ImageOptions(),
        source={},
        num_workers=num_workers,
        chunk_size=5,
        min_bytes=min_bytes,
    )


def segments() -> set[str]:
    """Return named shared memory that no process holds, so that an ended process left it."""
    held: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            held.update(re.findall(r"/dev/shm/(\S+)", maps.read_text()))
    return {path.name for path in SHARED_MEMORY.glob("psm_*")} - held


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_leftover_and_an_older_file_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    (tmp_path / ".a.beton.partial").write_text("left by a killed run")
    write(path, Images(3))
    assert write(path, Images(7)).num_samples == verify(path, level=2).num_samples == 7
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.beton", "a.beton.json"]


def test_a_killed_worker_ends_the_run_at_once(tmp_path: Path) -> None:
    def die(index: int) -> None:
        if index == 42:
            os.kill(os.getpid(), signal.SIGKILL)

    before, started = segments(), time.monotonic()
    with pytest.raises(PeerError, match="a worker process was killed by SIGKILL"):
        write(tmp_path / "a.beton", Images(200, die))
    assert time.monotonic() - started < 10
    assert list(tmp_path.iterdir()) == []
    assert wait_until(lambda: segments() <= before)
    assert multiprocessing.active_children() == []


def test_an_error_in_a_worker_is_the_error_of_the_run(tmp_path: Path) -> None:
    def fail(index: int) -> None:
        if index == 3:
            raise DataError("image 3 vanished", do="bring it back")
        if index == 100:
            raise ZeroDivisionError("a slip")

    with pytest.raises(DataError, match=r"^image 3 vanished; do: bring it back$"):
        write(tmp_path / "a.beton", Images(50, fail))
    with pytest.raises(RunError, match="ZeroDivisionError: a slip"):
        write(tmp_path / "a.beton", Images(101, lambda index: fail(index) if index > 3 else None))
    assert list(tmp_path.iterdir()) == []


def test_a_label_outside_the_classes_is_refused(tmp_path: Path) -> None:
    class Wrong(Images):
        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return super().__getitem__(index)[0], 1

    with pytest.raises(DataError, match="sample 0 has label 1, expected 0–0 for 1 classes"):
        write(tmp_path / "a.beton", Wrong(3))
    assert list(tmp_path.iterdir()) == []


class Numbered:
    """All pixels of image i are i, its label is i; the images in ``bad`` are unusable."""

    def __init__(self, count: int, bad: set[int]) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index in self.bad:
            raise BadImage(f"{index}.jpg: cannot be decoded")
        return np.full((4, 5, 3), index, np.uint8), index


@pytest.mark.parametrize("is_moved", [False, True])
def test_images_that_turn_out_bad_are_left_out(is_moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``is_moved``: without the bad images, the table is one page shorter."""
    if is_moved:
        monkeypatch.setattr(
            writer,
            "pages_start",
            lambda count, page_size: pages_start(count, page_size) + (page_size if count > 5 else 0),
        )
    split = writer.Split(tmp_path / "a.beton", Numbered(7, {0, 4}), lambda num_written: {"num_images": num_written})
    how = {"classes": list("abcdefg"), "options": ImageOptions(), "num_workers": 2, "chunk_size": 2}
    with pytest.raises(
        DataError,
        match=r"found 2 unusable images, but --skip-bad allows 1; the first: 0.jpg: cannot be decoded",
    ):
        writer.write_splits([split], skip_bad=1, **how)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    (info,) = writer.write_splits([split], skip_bad=2, **how)  # type: ignore[arg-type]
    assert info.sidecar["source"] == {"num_images": 5}
    tables = read_tables(verify(info.path, level=2).path)
    assert tables.samples["label"].tolist() == [1, 2, 3, 5, 6]
    content = info.path.read_bytes()
    assert [content[start : start + size] for start, size in zip(tables.pointer, tables.size, strict=True)] == [
        bytes([value] * 60) for value in (1, 2, 3, 5, 6)
    ]
    with pytest.raises(DataError, match="none of the images is usable"):
        writer.write_splits([writer.Split(tmp_path / "b.beton", Numbered(2, {0, 1}), lambda _: {})], skip_bad=2, **how)  # type: ignore[arg-type]


def test_an_image_that_is_lost_while_all_are_written_again_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Vanishing(Numbered):
        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            try:
                (tmp_path / f"read-{index}").touch(exist_ok=index != 3)
            except FileExistsError:
                raise BadImage("3.jpg: input/output error") from None
            return super().__getitem__(index)

    monkeypatch.setattr(
        writer, "pages_start", lambda count, page_size: pages_start(count, page_size) + (page_size if count > 5 else 0)
    )
    split = writer.Split(tmp_path / "out" / "a.beton", Vanishing(7, {0, 4}), lambda _: {})
    with pytest.raises(
        DataError, match=r"a\.beton: images that could be read once cannot be read again: 3\.jpg: input/output error"
    ):
        writer.write_splits(
            [split], skip_bad=7, classes=list("abcdefg"), options=ImageOptions(), num_workers=2, chunk_size=2
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_one_write_error(tmp_path: Path) -> None:
    """A limit on file size replaces the full disk: the same write fails in the same place."""

    def write_with_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, 20 << 20))
        try:
            write(tmp_path / "a.beton", Images(300))  # 59 MB
        except WriteError as error:
            os._exit(error.code if "no space: " in str(error) and "ulimit -f" in str(error) else 1)

    before = segments()
    child = multiprocessing.get_context("fork").Process(target=write_with_limit)
    child.start()
    child.join(30)
    assert child.exitcode == WriteError.code
    assert list(tmp_path.iterdir()) == []
    assert wait_until(lambda: segments() <= before)


def test_space_and_folder_are_checked_before_writing(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"needs at least .* MiB are free"):
        write(tmp_path / "a.beton", Images(1), min_bytes=1 << 60)
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"Not a directory|File exists"):
        write(tmp_path / "file" / "a.beton", Images(1))


SLOW_RUN = """
import sys, time
from pathlib import Path
import numpy as np
from data_prep.images import ImageOptions
from data_prep.writer import write_beton

class Slow:
    def __len__(self): return 1000
    def __getitem__(self, index):
        time.sleep(0.02)
        return np.zeros((256, 256, 3), np.uint8), 0

write_beton(Path(sys.argv[1]), Slow(), classes=["only"], options=ImageOptions(), source={}, num_workers=2)
"""


def test_sigkill_in_the_middle_leaves_no_final_name_no_process_and_no_shared_memory(tmp_path: Path) -> None:
    path, partial, before = tmp_path / "a.beton", tmp_path / ".a.beton.partial", segments()
    with subprocess.Popen([sys.executable, "-c", SLOW_RUN, str(path)]) as run:
        assert wait_until(lambda: partial.exists() and partial.stat().st_size > 8 << 20, seconds=60)
        workers = psutil.Process(run.pid).children(recursive=True)
        run.kill()
    assert len(workers) >= 2
    assert [entry.name for entry in tmp_path.iterdir()] == [partial.name]
    assert wait_until(lambda: not any(map(is_alive, workers)))
    assert wait_until(lambda: segments() <= before)
    assert write(path, Images(3)).num_samples == 3  # the next run replaces what is left
    assert not partial.exists()


NAMES = ("train.beton", "val.beton")


@pytest.fixture(scope="module")
def old_and_new(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of both splits, whose tables have the same bytes: only pixels differ."""
    folders = []
    for name, value in (("old", 1), ("new", 2)):
        folders.append(tmp_path_factory.mktemp(name))
        for index, split in enumerate(NAMES):
            images = [(np.full((4, 5, 3), value + index, np.uint8), 0)] * 3
            write_beton(folders[-1] / split, images, classes=["only"], options=ImageOptions(), source={}, num_workers=1)
    return folders[0], folders[1]


def publish_in_child(folder: Path, old: Path, new: Path, *, at: int, how: signal.Signals) -> tuple[int, list[str]]:
    """Publish ``new`` over ``old`` in a child that is killed before its ``at``-th change of a name.

    Returns:
        The exit code, and the set that each file belongs to.
    """
    splits = [writer.Split(folder / name, Images(0), lambda _: {}) for name in NAMES]
    folder.mkdir()
    for name, split in zip(NAMES, splits, strict=True):
        for suffix in ("", ".json"):
            os.link(old / f"{name}{suffix}", folder / f"{name}{suffix}")
            os.link(new / f"{name}{suffix}", f"{split.partial}{suffix}")
    child = os.fork()
    if child == 0:
        count = 0

        def then(action: Callable[..., object]) -> Callable[..., object]:
            def counted(*given: object, **named: object) -> object:
                nonlocal count
                if count == at:
                    os.kill(os.getpid(), how)
                count += 1
                return action(*given, **named)

            return counted

        Path.unlink, Path.replace = then(Path.unlink), then(Path.replace)  # type: ignore[method-assign, assignment]
        try:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
            writer._publish(splits)
        finally:
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = []
    for name in NAMES:
        try:
            content = verify(folder / name, level=2).digest
            found.append("old" if content == verify(old / name, level=0).digest else "new")
        except DataError as error:
            found.append("no sidecar" if "has no sidecar" in str(error) else str(error))
    return code, found


def test_a_kill_while_files_take_their_names_leaves_whole_sets_or_files_that_are_refused(
    old_and_new: tuple[Path, Path], tmp_path: Path
) -> None:
    left = [publish_in_child(tmp_path / str(at), *old_and_new, at=at, how=signal.SIGKILL) for at in range(7)]
    assert [code for code, _ in left] == [-signal.SIGKILL] * 6 + [0]
    assert [found for _, found in left] == [
        ["old", "old"],
        ["no sidecar", "old"],
        *[["no sidecar", "no sidecar"]] * 3,
        ["new", "no sidecar"],
        ["new", "new"],
    ]


def test_a_stop_while_files_take_their_names_waits_for_the_last(old_and_new: tuple[Path, Path], tmp_path: Path) -> None:
    for at in range(6):
        assert publish_in_child(tmp_path / str(at), *old_and_new, at=at, how=signal.SIGTERM) == (9, ["new", "new"])


def test_run_workers_hands_over_everything() -> None:
    received: list[int] = []
    run_workers(lambda index, send: [send(10 * index + i) for i in range(3)] and None, 3, receive=received.append)
    assert sorted(received) == [0, 1, 2, 10, 11, 12, 20, 21, 22]


def test_a_worker_killed_in_the_middle_of_a_message_is_a_lost_worker() -> None:
    def die(index: int, send: Callable[[object], None]) -> None:
        pipe = send.__self__.fileno()  # type: ignore[attr-defined]
        os.write(pipe, (1000).to_bytes(4, "big") + b"the first of 1000 bytes")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(PeerError, match="a worker process was killed by SIGKILL"):
        run_workers(die, 2, receive=lambda _: None)
