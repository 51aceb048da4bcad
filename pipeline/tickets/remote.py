"""Keep tickets in an object store through fsspec: a run can copy its tickets there, and every command can read them.

An object appears complete or not at all if the store's ``put`` is atomic. ``file://`` means an
ordinary folder, for which `pipeline.tickets.store` gives guarantees of its own.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from pipeline.errors import DataError, IntegrityError, PermissionDenied, RunError, ServiceError, WriteError
from pipeline.redaction import redact
from pipeline.tickets.claim import OWNER_FILE, check_claim, claim_of
from pipeline.tickets.verify import read_verified

logger = logging.getLogger(__name__)

HUB = "hf://"  # addresses of the Hugging Face Hub, for which huggingface_hub gives fsspec a file system
TICKET, DENSE = "ticket.safetensors", "model.safetensors"  # of a published ticket, see pipeline.tickets.card


def is_remote(place: str) -> bool:
    """Return whether ``place`` is a URL of anything but a local file."""
    return "://" in place and not place.startswith("file://")


def as_path(place: str) -> Path:
    """Return the path of a local file, given as such or as ``file:///…``."""
    return Path(place.removeprefix("file://"))


def ticket_names(names: Iterable[str]) -> list[str]:
    """Return the names of files that may be tickets, in order: not the dense network beside a published ticket."""
    found = sorted(name for name in names if name.endswith(".safetensors") and not name.startswith("."))
    return [name for name in found if name != DENSE or TICKET not in found]


def missing_hub(place: str) -> ServiceError:
    """Return the error for an address of the Hugging Face Hub where its package is not installed."""
    return ServiceError(f"{place}: needs huggingface_hub, which is not installed", do="pip install -e '.[hub]'")


class RemoteFolder:
    """A folder of an object store, such as ``s3://bucket/run/tickets``.

    Raises:
        ServiceError: fsspec has no file system of that kind, or the store does not respond.
    """

    def __init__(self, url: str) -> None:
        import fsspec  # half a second

        self.url = url.rstrip("/")
        with _failing(self.url):
            self.files, self.root = fsspec.core.url_to_fs(self.url)

    def names(self) -> list[str]:
        """List the names of the ticket files, in order.

        Raises:
            DataError: the folder does not exist.
        """
        with _failing(self.url):
            self.files.invalidate_cache()
            try:
                found = [PurePosixPath(path).name for path in self.files.ls(self.root, detail=False)]
            except FileNotFoundError:
                raise DataError(f"{self.url}: does not exist", do="pass a folder of tickets") from None
        return ticket_names(found)

    def fetch(self, name: str, path: Path) -> None:
        """Copy an object into a file; does nothing if its owner has removed it meanwhile."""
        with _failing(self.url), contextlib.suppress(FileNotFoundError):
            self.files.get_file(self._path(name), str(path))

    def read(self, name: str) -> bytes | None:
        """Return the content of an object; None if it does not exist."""
        with _failing(self.url):
            try:
                return bytes(self.files.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def claim(self, owner: str) -> None:
        """Claim the folder for ``owner``, or check that it is claimed already.

        An existing claim is never overwritten. A new one is created exclusively if fsspec's backend
        supports that. If not, two runs that start at the same moment can both write a claim; each
        reads it back, so the run whose claim was overwritten is rejected, except when it read its
        own just before that.

        Raises:
            WriteError: the folder belongs to another run.
        """
        there = self.read(OWNER_FILE)
        if there is None:
            with _failing(self.url), contextlib.suppress(FileExistsError):
                self.files.makedirs(self.root, exist_ok=True)
                self.files.pipe_file(self._path(OWNER_FILE), claim_of(owner), mode="create")
            there = self.read(OWNER_FILE)
        check_claim(there or b"", owner, folder=self.url)

    def publish(self, name: str, content: bytes) -> None:
        """Upload a ticket; an equal ticket that exists already is accepted.

        Raises:
            IntegrityError: a different ticket has this name.
        """
        there = self.read(name)
        if there is None:
            with _failing(self.url):
                self.files.pipe_file(self._path(name), content)
        elif read_verified(there).content_digest != read_verified(content).content_digest:
            raise IntegrityError(
                f"{self.url}/{name}: already exists with different content",
                do="use an empty folder, or find out why the resumed run differs",
            )

    def write(self, name: str, content: bytes) -> None:
        """Write an object; one that exists is replaced."""
        with _failing(self.url):
            self.files.pipe_file(self._path(name), content)

    def remove(self, name: str) -> None:
        """Remove an object, if it exists."""
        with _failing(self.url), contextlib.suppress(FileNotFoundError):
            self.files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"


@contextlib.contextmanager
def fetched(places: Sequence[str]) -> Iterator[list[Path]]:
    """Yield local folders or files for paths and URLs; copies of remote ones are removed afterwards.

    A copy keeps the last two parts of its name, which distinguish runs.

    Raises:
        DataError: a remote folder does not exist.
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
    """Turn the exceptions of file systems into errors of this project; callers handle FileExistsError themselves."""
    try:
        yield
    except (RunError, FileExistsError):
        raise
    except ImportError as error:
        if url.startswith(HUB):
            raise missing_hub(url) from None
        raise ServiceError(f"{url}: {error}", do="install the missing package") from None
    except ValueError as error:
        raise ServiceError(f"{url}: {error}", do="use a URL that fsspec supports, such as s3://bucket/folder") from None
    except PermissionError as error:
        raise PermissionDenied(f"{url}: {error}", do="give this user read and write access") from None
    except OSError as error:
        raise WriteError(f"{url}: cannot be read or written: {error}", do="check the URL and the store") from None
    except Exception as error:  # the client of each store has exceptions of its own
        raise ServiceError(
            f"{url}: {type(error).__name__}: {error}", do="check the URL, the credentials and the store"
        ) from error
