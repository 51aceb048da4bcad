"""Publish the files of a ticket: in a model repository of the Hugging Face Hub, an object store, or a folder.

Reading needs nothing of this: huggingface_hub gives fsspec the addresses ``hf://owner/name``.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import ConfigError, IntegrityError, PermissionDenied, ServiceError
from pipeline.files import write_atomically
from pipeline.tickets.remote import HUB, TICKET, RemoteFolder, as_path, is_remote, missing_hub
from pipeline.tickets.verify import read_verified

_REPOSITORY = re.compile(r"hf://([\w.-]{1,96}/[\w.-]{1,96})/?", re.ASCII)


def require_place(place: str) -> None:
    """Check that tickets can be published at a place, as far as this is known without asking it.

    Raises:
        ConfigError: it is not the address of a repository.
        ServiceError: huggingface_hub is needed and is not installed.
    """
    if not place.startswith(HUB):
        return
    if not _REPOSITORY.fullmatch(place):
        raise ConfigError(f"{place}: is not the address of a model", do="write it as hf://owner/name")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise missing_hub(place)


def publish(files: Mapping[str, bytes], place: str, *, is_public: bool = False, message: str = "") -> None:
    """Write the files of a ticket; in a repository they are one commit.

    Args:
        files: content by name, of :func:`pipeline.tickets.card.published_files`.
        place: ``hf://owner/name``, another URL that fsspec supports, or a folder.
        is_public: whether everybody may read a repository that is made now.
        message: of the commit.

    Raises:
        ConfigError: the place is not the address of a repository.
        IntegrityError: the folder has another ticket; a repository keeps the one before.
        ServiceError: a package is missing, or the service does not respond.
        PermissionDenied: this user may not write there.
        WriteError: a file cannot be written.
    """
    require_place(place)
    if place.startswith(HUB):
        _commit(files, place, is_public=is_public, message=message)
    elif is_remote(place):
        folder = RemoteFolder(place)
        _require_same(folder.read(TICKET), files[TICKET], place)
        for name, content in files.items():
            folder.write(name, content)
    else:
        path = as_path(place)
        _require_same(path / TICKET if (path / TICKET).exists() else None, files[TICKET], place)
        path.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(path / name, content)


def _require_same(there: bytes | Path | None, content: bytes, place: str) -> None:
    if there is not None and read_verified(there).content_digest != read_verified(content).content_digest:
        raise IntegrityError(f"{place}: has another ticket", do="choose another place, or remove what is there")


def _commit(files: Mapping[str, bytes], place: str, *, is_public: bool, message: str) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi  # a second
    from huggingface_hub.errors import HfHubHTTPError

    match = _REPOSITORY.fullmatch(place)
    assert match is not None
    api, repository = HfApi(library_name="ticketworks"), match[1]
    try:
        api.create_repo(repository, exist_ok=True, private=not is_public)
        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(
            repository, added, commit_message=message or f"Ticket {read_verified(files[TICKET]).content_digest[:12]}"
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        kind = PermissionDenied if status in (401, 403, 404) else ServiceError
        do = "log in with hf auth login or set HF_TOKEN, and check the owner's name" if kind is PermissionDenied else ""
        said = str(error.server_message or error).strip().partition("\n")[0]
        raise kind(f"{place}: refused with status {status}: {said}", do=do or "try again later") from None
    except Exception as error:  # the client's and its transport's own
        what = f"{place}: {type(error).__name__}: {error}"
        raise ServiceError(what, do="check the network, HF_ENDPOINT and HF_TOKEN") from error
