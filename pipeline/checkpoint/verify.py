"""Check that a folder is a checkpoint that a run can resume from.

Does not import torch, so that a wrong ``--resume`` is reported within a second. The content of a
checkpoint is described in :mod:`pipeline.checkpoint.checkpoints`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.chain import canonical, position_problem
from pipeline.files import JSON_TYPES, cannot_read, describe_json, open_regular, parse_json, read_capped, sha256_of

FORMAT = 1
FOLDER = re.compile(r"step-([0-9]{8,12})")
MAX_JSON_BYTES = 16 << 20  # state.json of a run on 100 ranks has 100 kB
MAX_RANKS = 1 << 20
NOT_THERE = (errno.ENOENT, errno.ENOTDIR)
_STATE = {
    "format": int,
    "step": int,
    "samples_seen": int,
    "world_size": int,
    "environment": dict,
    "config": dict,
    "data_digest": str,
    "sparsifier": dict,
    "tracker_run": str,
    "arithmetic": int,
    "best": dict,
    "chain": dict,
    "is_evaluation_left_out": bool,
}


def files_of(world_size: int) -> set[str]:
    """Return the names of a checkpoint's files, without its manifest."""
    return {"state.json", "state.safetensors", *(f"rank-{rank}.safetensors" for rank in range(world_size))}


def checkpoints_in(folder: Path) -> list[Path]:
    """List the folders that have the name of a checkpoint, the newest step first.

    Raises:
        WriteError, PermissionDenied: ``folder`` cannot be read.
    """
    try:
        found = [path for path in folder.iterdir() if FOLDER.fullmatch(path.name)]
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise cannot_read(folder, error) from error
        found = []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Read and check ``state.json``.

    Raises:
        ValueError: it is invalid; the text is the reason.
        OSError: it cannot be read.
    """
    state = _read_json(folder / "state.json")
    if not isinstance(state, dict):
        raise ValueError(f"state.json: expected a JSON object, got {describe_json(state)}")
    if state.get("format") != FORMAT:
        wrong = f"expected checkpoint format {FORMAT}, got {describe_json(state.get('format'))}"
        if type(state.get("format")) is int:
            wrong = f"{wrong}: it was written by another version of ticketworks, which can resume it"
        raise ValueError(f"state.json: {wrong}")
    state.setdefault("arithmetic", 0)  # version 0.1 does not record it
    state.setdefault("best", {})  # only of runs that choose the best state of a phase
    state.setdefault("chain", {})  # of runs with a chain
    state.setdefault("is_evaluation_left_out", False)
    for key, kind in _STATE.items():
        if type(state.get(key)) is not kind or (kind is int and state[key] < 0):
            expected = JSON_TYPES[kind] + " of at least 0" * (kind is int)
            got = describe_json(state[key]) if key in state else "nothing"
            raise ValueError(f"state.json: {key}: expected {expected}, got {got}")
    if problem := position_problem(state["chain"]):
        raise ValueError(f"state.json: {problem}")
    if not 1 <= state["world_size"] <= MAX_RANKS:
        raise ValueError(f"state.json: world_size: expected 1 to {MAX_RANKS}, got {state['world_size']}")
    return state


def _read_json(path: Path) -> Any:
    """Read a JSON file; the text of a ValueError names it."""
    with _naming(path):
        content = read_capped(path, MAX_JSON_BYTES)
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}") from None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in the text of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from None


def find_damage(folder: Path) -> str:
    """Read and hash every file of a checkpoint; return why it is not valid, or an empty text.

    Raises:
        WriteError, PermissionDenied: it cannot be read now. It may be valid, so a run must not resume
            from an older one instead.
    """
    try:
        manifest = _read_json(folder / "manifest.json")
        files = manifest.get("files") if isinstance(manifest, dict) else None
        if not isinstance(files, dict) or not files:
            return "its manifest lists no files"
        state = read_state(folder)
        if len(files) != 2 + state["world_size"] or set(files) != files_of(state["world_size"]):
            return _wrong_names(set(files), files_of(state["world_size"]))
        for name, digest in files.items():
            with _naming(folder / name):
                actual = sha256_of(folder / name)
            if actual != digest:
                return f"{name}: expected sha256 {str(digest)[:12]}… as in the manifest, got {actual[:12]}…"
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise cannot_read(Path(error.filename or folder), error) from error
        return f"{Path(str(error.filename)).name} is missing"
    except ValueError as error:
        return str(error)
    return ""


# -- what a chain says of a checkpoint


def digest_of_file(path: Path) -> str:
    """Return the sha256 (hex) of names, types, shapes and bytes of all tensors in a safetensors file.

    It does not depend on how the file arranges them. `digest.digest_of_tensors` computes the same in memory.

    Raises:
        ValueError: it is not a safetensors file.
        OSError: it cannot be read.
    """
    with _naming(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_JSON_BYTES):
            raise ValueError("it is not a safetensors file")
        header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("it is not a safetensors file")
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            try:
                kind, shape, (start, stop) = str(entry["dtype"]), list(entry["shape"]), entry["data_offsets"]
                if not 0 <= start <= stop <= size - 8 - length:
                    raise ValueError
                file.seek(8 + length + start)
                found[name] = (kind, shape, hashlib.sha256(file.read(stop - start)).digest())
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{name[:80]!r} is not the entry of a tensor") from None
    return combined(found)


def combined(tensors: Mapping[str, tuple[str, list[int], bytes]]) -> str:
    """Return one sha256 (hex) of tensors: name -> (type as in safetensors, shape, sha256 of the bytes)."""
    lines = [f"{name} {kind} {shape} {digest.hex()}\n" for name, (kind, shape, digest) in sorted(tensors.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def shared_digest(tensors: str, numbers: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    """Return the digest of all that ranks share: ``state.safetensors``, numbers of sparsifier and best ticket."""
    return hashlib.sha256(f"{tensors}\n{canonical(numbers)}\n{canonical(best)}".encode()).hexdigest()


def digests_of(folder: Path, state: Mapping[str, Any]) -> dict[str, str]:
    """Return what the chain's record of this checkpoint says: ``shared`` and ``ranks``.

    Raises:
        ValueError, OSError: see :func:`digest_of_file`.
    """
    of_ranks = [digest_of_file(folder / f"rank-{rank}.safetensors") for rank in range(state["world_size"])]
    shared = shared_digest(digest_of_file(folder / "state.safetensors"), state["sparsifier"], state["best"])
    return {"shared": shared, "ranks": join_ranks(of_ranks)}


def join_ranks(digests: Iterable[str]) -> str:
    """Return the sha256 (hex) of the ranks' digests, in their order."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _wrong_names(listed: set[str], expected: set[str]) -> str:
    """Say which names a manifest lists too few and too many."""
    wrong = {"does not list": expected - listed, "lists": listed - expected}
    parts = [f"{verb} {_some(names)}" for verb, names in wrong.items() if names]
    extra = ", which no checkpoint contains" if listed - expected else ""
    return f"its manifest {' and '.join(parts)}{extra}"


def _some(names: set[str]) -> str:
    """Return up to 8 of the names, and how many more there are."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(sorted(names)[:8]) + more
