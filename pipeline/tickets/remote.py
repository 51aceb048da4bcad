"""Tickets in an object store, by fsspec: a run's folder can be copied there as it grows, and every command reads from there.

An object appears whole or not at all where the store's ``put`` is atomic. ``file://`` is an ordinary folder, for which
`pipeline.tickets.store` has guarantees of its own.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from pipeline.errors import DataError, IntegrityError, PermissionDenied, RunError, ServiceError, WriteError
from pipeline.redaction import redact
from pipeline.tickets.claim import OWNER_FILE, check_claim, claim_of
from pipeline.tickets.verify import read_verified

logger = logging.getLogger(__name__)


def is_remote(place: str) -> bool:
    """Whether this is a URL of something other than a file."""
    return "://" in place and not place.startswith("file://")


def as_path(place: str) -> Path:
    """A path, given as such or as ``file:///…``."""
    return Path(place.removeprefix("file://"))


class RemoteFolder:
    """A prefix of an object store, such as ``s3://bucket/run/tickets``.

    Raises ServiceError when fsspec has no file system of that kind, or the store does not answer.
    """

    def __init__(self, url: str) -> None:
        import fsspec  # half a second

        self.url = url.rstrip("/")
        with _failing(self.url):
            self.files, self.root = fsspec.core.url_to_fs(self.url)

    def names(self) -> list[str]:
        """Of the ticket files, in order. Raises DataError when nothing is there."""
        with _failing(self.url):
            self.files.invalidate_cache()
            try:
                found = sorted(PurePosixPath(path).name for path in self.files.ls(self.root, detail=False))
            except FileNotFoundError:
                raise DataError(f"{self.url}: nothing is there", do="name a folder of tickets") from None
        return [name for name in found if name.endswith(".safetensors")]

    def fetch(self, name: str, path: Path) -> None:
        """Copy an object into a file; none when its owner has removed it meanwhile."""
        with _failing(self.url), contextlib.suppress(FileNotFoundError):
            self.files.get_file(self._path(name), str(path))

    def read(self, name: str) -> bytes | None:
        """The content of an object; None when there is none."""
        with _failing(self.url):
            try:
                return bytes(self.files.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def take(self, owner: str) -> None:
        """Put our name on it, or find it there. Raises WriteError when it belongs to another run.

        One that is there is never written over. Where there is none it is created, exclusively
        where fsspec's backend can, and read back: elsewhere, of two runs that start at the same
        moment, the one whose claim was overwritten is refused, unless it read its own just before
        that.
        """
        there = self.read(OWNER_FILE)
        if there is None:
            with _failing(self.url), contextlib.suppress(FileExistsError):
                self.files.makedirs(self.root, exist_ok=True)
                self.files.pipe_file(self._path(OWNER_FILE), claim_of(owner), mode="create")
            there = self.read(OWNER_FILE)
        check_claim(there or b"", owner, folder=self.url)

    def publish(self, name: str, content: bytes) -> None:
        """Put a ticket there. The same again is accepted; raises IntegrityError when another one has the name."""
        there = self.read(name)
        if there is None:
            with _failing(self.url):
                self.files.pipe_file(self._path(name), content)
        elif read_verified(there).content_digest != read_verified(content).content_digest:
            raise IntegrityError(
                f"{self.url}/{name}: already there with another content",
                do="use an empty prefix, or find out why the resumed run differs",
            )

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with _failing(self.url), contextlib.suppress(FileNotFoundError):
            self.files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"


@contextlib.contextmanager
def fetched(places: Sequence[str]) -> Iterator[list[Path]]:
    """Folders or files on this machine for paths and URLs; copies of what is remote are removed afterwards.

    A copy keeps the last two parts of its name, by which runs are told apart. Raises DataError when nothing is there.
    """
    with tempfile.TemporaryDirectory(prefix="tickets-") as root:
        yield [
            _fetch(place, Path(root, str(i))) if is_remote(place) else as_path(place) for i, place in enumerate(places)
        ]


def _fetch(url: str, root: Path) -> Path:
    above, name = PurePosixPath(url.rstrip("/")).parts[-2:]
    is_file = name.endswith(".safetensors")
    folder = RemoteFolder(url.rstrip("/").rpartition("/")[0] if is_file else url)
    target = root / above if is_file else root / above / name
    target.mkdir(parents=True)
    for each in [name] if is_file else folder.names():
        folder.fetch(each, target / each)
    logger.info("%s: %d files copied to %s", redact(url), len(list(target.iterdir())), target)
    return target / name if is_file else target


@contextlib.contextmanager
def _failing(url: str) -> Iterator[None]:
    """What file systems raise, as an error of this project. FileExistsError means something to the callers."""
    try:
        yield
    except (RunError, FileExistsError):
        raise
    except ImportError as error:
        raise ServiceError(f"{url}: {error}", do="install the package that it names") from None
    except ValueError as error:
        raise ServiceError(f"{url}: {error}", do="use a URL that fsspec knows, such as s3://bucket/folder") from None
    except PermissionError as error:
        raise PermissionDenied(f"{url}: {error}", do="give this user the right to read and write there") from None
    except OSError as error:
        raise WriteError(f"{url}: cannot be read or written: {error}", do="check the URL and the store") from None
    except Exception as error:  # every store's client has its own
        raise ServiceError(
            f"{url}: {type(error).__name__}: {error}", do="check the URL, the credentials and the store"
        ) from error
