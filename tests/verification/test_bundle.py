"""Bundles: their bytes, and what is refused when one is opened."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers import bundle as command
from launchers.bundle import spread
from pipeline.errors import IntegrityError
from pipeline.verification.bundle import MANIFEST, check_manifest, unpacked, write_bundle
from pipeline.verification.verdict import verify


def test_the_same_run_gives_the_same_bytes_and_every_file_comes_back(run: Path, bundle: Path, tmp_path: Path) -> None:
    checkpoints = sorted((run / "checkpoints").iterdir())
    results = [write_bundle(run, tmp_path / name, checkpoints) for name in ("a.tar", "b.tar")]
    assert results[0] == results[1]
    assert (tmp_path / "a.tar").read_bytes() == (bundle.parent / "bundle.tar").read_bytes()
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    assert len(files) == results[0][0] == 4 + 2 + 4 + 4 * 4  # run, tickets, report, checkpoints
    assert all((bundle / name).read_bytes() == (run / name).read_bytes() for name in files)


def test_the_command_packs_a_run_and_the_file_is_verified(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.tar"
    assert command.main([str(run), "--output", str(file), "--checkpoints", "2"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{file}: 18 files, 2 checkpoints, ")
    assert verify(str(file), num_segments=0, seed=0).startswith(f"CONSISTENT {file}: ")
    assert command.main([str(run), "--output", str(file)]) == 73
    assert command.main([str(tmp_path), "--output", str(tmp_path / "b.tar")]) == 64


def test_checkpoints_are_spread_evenly() -> None:
    paths = [Path(str(number)) for number in range(10)]
    assert [int(path.name) for path in spread(paths, 2)] == [2, 7]
    assert [int(path.name) for path in spread(paths, 3)] == [1, 5, 8]
    assert spread(paths, 0) == []
    assert spread(paths, None) == spread(paths, 10) == paths


def tar_of(path: Path, *entries: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for entry, content in entries:
            tar.addfile(entry, io.BytesIO(content))
    return path


def entry(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    info.linkname = "/etc/passwd" if kind == tarfile.SYMTYPE else ""
    return info, content


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no tar": (lambda path: (path.write_bytes(b"x" * 2000) and path) or path, "is not a bundle"),
    "a path outside": (lambda path: tar_of(path, entry("../evil", b"x")), "'../evil' does not belong into a bundle"),
    "an absolute path": (lambda path: tar_of(path, entry("/tmp/evil", b"x")), "does not belong into a bundle"),
    "a link": (lambda path: tar_of(path, entry("run.json", kind=tarfile.SYMTYPE)), "does not belong into a bundle"),
    "a file twice": (lambda path: tar_of(path, entry("run.json"), entry("run.json")), "'run.json' is there twice"),
    "no manifest": (lambda path: tar_of(path, entry("run.json")), "has no manifest.json"),
    "a manifest that is no object": (lambda path: tar_of(path, entry(MANIFEST, b"[]")), "its structure is not as"),
    "a file less": (
        lambda path: tar_of(path, entry(MANIFEST, b'{"format": 1, "files": {"run.json": "a"}}')),
        "run.json is missing",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_bundle_is_refused(tmp_path: Path, name: str) -> None:
    make, expected = BAD[name]
    path = make(tmp_path / "a.tar")
    with pytest.raises(IntegrityError, match=expected), unpacked(path) as folder:
        check_manifest(folder, "a.tar")
    assert sorted(tmp_path.iterdir()) == [path]
