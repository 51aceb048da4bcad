"""A bundle: a run as one file to publish, with a manifest of the hashes of all its files. Standard library only.

It is a tar file without compression, with the same bytes whenever it is made of the same files:
``manifest.json`` first, then the files in order of name, all as in the run's folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import ConfigError, IntegrityError
from pipeline.files import (
    CHUNK_BYTES,
    cannot_read,
    cannot_write,
    open_regular,
    parse_json,
    read_capped,
    sha256_of,
    why_malformed,
)

FORMAT = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 24
ALWAYS = ("config.yaml", "run.json", "chain.jsonl", "metrics.jsonl")  # those of them that the run has
REPORT = ("table.txt", "report.json", "predictions.npz")
_FILE = "[a-z0-9][a-z0-9_.-]{0,95}"
MEMBER = re.compile(
    rf"(?:{'|'.join(map(re.escape, ALWAYS))}|tickets/(?:best/)?{_FILE}\.safetensors|report/{_FILE}"
    rf"|checkpoints/step-[0-9]{{8,12}}/(?:manifest\.json|state\.json|(?:state|rank-[0-9]{{1,7}})\.safetensors))"
)
DAMAGED = "get an unchanged copy of the bundle"


def files_of(run: Path, checkpoints: Sequence[Path]) -> list[str]:
    """Return the names of the files that a bundle of the run has, with these of its checkpoints."""
    paths = [run / name for name in ALWAYS]
    paths += [path for folder in ("tickets", "tickets/best") for path in (run / folder).glob("*.safetensors")]
    paths += [run / "report" / name for name in REPORT] + list((run / "report").glob("*.safetensors"))
    paths += [path for folder in checkpoints for path in folder.iterdir()]
    names = sorted(path.relative_to(run).as_posix() for path in paths if path.is_file())
    return [name for name in names if MEMBER.fullmatch(name)]


def write_bundle(run: Path, output: Path, checkpoints: Sequence[Path]) -> tuple[int, str]:
    """Write a run as a bundle; return the number of files and the sha256 of the bundle.

    Raises:
        WriteError, PermissionDenied: it cannot be written; nothing is left behind.
    """
    names = files_of(run, checkpoints)
    partial = output.with_name(f".{output.name}.tmp")
    try:
        manifest = {"format": FORMAT, "files": {name: sha256_of(run / name) for name in names}}
        with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
            content = (json.dumps(manifest, indent=1) + "\n").encode()
            tar.addfile(_entry(MANIFEST, len(content)), io.BytesIO(content))
            for name in names:
                with open_regular(run / name) as file:
                    tar.addfile(_entry(name, (run / name).stat().st_size), file)
        digest = sha256_of(partial)
        partial.replace(output)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise cannot_write(output, error) from error
    return len(names), digest


def _entry(name: str, num_bytes: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)  # time 0, user 0
    entry.size, entry.mode = num_bytes, 0o644
    return entry


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Unpack a bundle into a temporary folder, which is removed at the end of the block.

    Raises:
        IntegrityError: it is not a bundle, or is damaged.
        WriteError, PermissionDenied: it cannot be read, or the copy cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="ticketworks-bundle-") as name:
        folder = Path(name)
        try:
            with open_regular(path, follow=True) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for entry in tar:
                    _unpack(tar, entry, folder)
        except tarfile.TarError as error:
            raise IntegrityError(f"{path}: is not a bundle: {error}", do=DAMAGED) from None
        except OSError as error:
            raise cannot_read(path, error) from error
        except ValueError as error:
            raise IntegrityError(f"{path}: {error}", do=DAMAGED) from None
        yield folder


def _unpack(tar: tarfile.TarFile, entry: tarfile.TarInfo, folder: Path) -> None:
    if not entry.isreg() or not (entry.name == MANIFEST or MEMBER.fullmatch(entry.name)):
        raise ValueError(f"{entry.name[:80]!r} does not belong into a bundle")
    target, source = folder / entry.name, tar.extractfile(entry)
    if target.exists() or source is None:
        raise ValueError(f"{entry.name!r} is there twice")
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        while chunk := source.read(CHUNK_BYTES):
            file.write(chunk)
    if target.stat().st_size != entry.size:
        raise ValueError(f"{entry.name!r} is cut off")


def check_manifest(folder: Path, name: str) -> str:
    """Check every file of an unpacked bundle against the manifest; return the sha256 of the manifest.

    ``name`` is what messages call the bundle.

    Raises:
        IntegrityError: a file is missing, changed or not listed, or the manifest is damaged.
        WriteError, PermissionDenied: a file cannot be read.
    """
    try:
        content = read_capped(folder / MANIFEST, MAX_MANIFEST_BYTES)
        manifest = parse_json(content)
        if manifest["format"] != FORMAT:
            raise ConfigError(f"{name}: its format is not supported by this version of ticketworks", do="use another")
        files = dict(manifest["files"])
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {MANIFEST}
        if odd := sorted(there ^ files.keys()):
            raise ValueError(f"{odd[0]} is {'missing' if odd[0] in files else 'not in the manifest'}")
        for file, expected in files.items():
            if not MEMBER.fullmatch(file):
                raise ValueError(f"{file[:80]!r} does not belong into a bundle")
            if (found := sha256_of(folder / file)) != expected:
                raise ValueError(f"{file}: has sha256 {found[:12]}…, expected {str(expected)[:12]}… as in the manifest")
    except FileNotFoundError:
        raise IntegrityError(f"{name}: has no {MANIFEST}", do=DAMAGED) from None
    except OSError as error:
        raise cannot_read(Path(error.filename or folder), error) from error
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"{name}: {why_malformed(error)}", do=DAMAGED) from None
    return hashlib.sha256(content).hexdigest()
