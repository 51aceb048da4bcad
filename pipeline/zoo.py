"""The zoo: published runs by name, as ``zoo/index.json`` of the checkout lists them. Standard library only.

An entry is ``"NAME": {"bundle": "PATH in zoo/", "sha256": "…", …}``: a file of ``python -m launchers.bundle``
and its hash, or an unpacked one, a folder, and the hash of its ``manifest.json``. For a folder ``"ticket"`` is the
network that the name loads. Further fields are for readers. ``tools/zoo.py`` writes entries.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from pipeline.errors import ConfigError, DataError, IntegrityError
from pipeline.files import parse_json, read_capped, sha256_of, why_malformed

FOLDER = Path(__file__).resolve().parents[1] / "zoo"
INDEX, MANIFEST, SUFFIX = "index.json", "manifest.json", ".safetensors"
MAX_BYTES = 1 << 24
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


def entries(folder: Path = FOLDER) -> dict[str, dict[str, object]]:
    """Return the entries by name; none where there is no zoo.

    Raises:
        DataError: the index is damaged.
    """
    try:
        found = parse_json(read_capped(folder / INDEX, MAX_BYTES))["entries"]
        return {str(name): {**entry, "bundle": str(entry["bundle"])} for name, entry in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{folder / INDEX}: {why_malformed(error)}", do="restore it from a copy") from None


def find(name: str, folder: Path = FOLDER) -> Path:
    """Return the path of an entry's bundle, whose hash is that of the index.

    Raises:
        ConfigError: there is no such entry; suggests similar names.
        IntegrityError: the bundle is missing or has another hash.
    """
    known = entries(folder)
    if not NAME.fullmatch(name) or name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)
        hint = f"pass one of {', '.join(close)}, or a folder or bundle" if known else "pass the folder of a run"
        raise ConfigError(f"{name}: is not a folder, a bundle or an entry of the zoo", do=hint)
    path = folder / str(known[name]["bundle"])
    hashed = path / MANIFEST if path.is_dir() else path
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError("is outside the zoo")
        if (found := sha256_of(hashed)) != known[name].get("sha256"):
            raise ValueError(
                f"has sha256 {found[:12]}…, expected {str(known[name].get('sha256'))[:12]}… as in the index"
            )
    except OSError as error:
        raise IntegrityError(f"{hashed}: {error.strerror}", do="restore it from a copy") from None
    except ValueError as error:
        raise IntegrityError(f"{hashed}: {error}", do="restore it from a copy") from None
    return path


def tickets(name: str, folder: Path = FOLDER) -> dict[str, Path]:
    """Return the tickets of an entry and its superposed network by the names of their files, the one to load first.

    Raises:
        ConfigError: there is no such entry.
        DataError: the entry is a packed bundle.
        IntegrityError: the bundle is damaged, or has not the ticket that the index names.
    """
    path = find(name, folder)
    if not path.is_dir():
        raise DataError(f"{name}: its bundle {path} is packed", do="unpack it with tar, and pass a ticket file")
    found = {file.stem: file for part in ("report", "tickets") for file in sorted((path / part).glob("*.safetensors"))}
    first = Path(str(entries(folder)[name].get("ticket"))).stem
    if first not in found:
        raise IntegrityError(f"{path}: contains no ticket {first}, which the index names", do="restore it from a copy")
    return {first: found.pop(first), **found}


def find_ticket(name: str, folder: Path = FOLDER) -> Path:
    """Return the file of ``ENTRY``, or of ``ENTRY/TICKET`` for another of its tickets.

    Raises:
        ConfigError: there is no such entry, or it has no such ticket; names those that there are.
        DataError: the entry is a packed bundle.
        IntegrityError: the bundle is damaged.
    """
    entry, _, ticket = name.partition("/")
    known = entries(folder)
    if entry not in known:
        have = f"one of {', '.join(sorted(known))}" if known else f"an entry of the zoo, of which {folder} has none"
        raise ConfigError(
            f"{name}: is neither a file nor an entry of the zoo ({folder})",
            do=f"pass a ticket file, or {have}; the zoo comes with a checkout of the project, not with the package",
        )
    of_entry = tickets(entry, folder)
    if ticket and ticket not in of_entry:
        raise ConfigError(f"{name}: {entry} has no ticket {ticket!r}", do=f"pass one of {', '.join(of_entry)}")
    return of_entry[ticket] if ticket else next(iter(of_entry.values()))


def ticket_file(place: str) -> Path:
    """Return the path that was given, or the ticket file that a name as :func:`find_ticket` takes it stands for.

    Raises:
        ConfigError: it is neither a path nor a name of the zoo.
        DataError: it is the name of a packed bundle.
        IntegrityError: the bundle is damaged.
    """
    path = Path(place).expanduser()
    if path.exists() or place.endswith(SUFFIX):
        return path  # reading reports what is wrong with it
    return find_ticket(place)
