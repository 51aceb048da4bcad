"""Read state dictionaries of others: safetensors, or torch's files without any code in them."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.errors import DataError, PermissionDenied
from pipeline.files import open_regular

MAX_BYTES = 16 << 30
# Under these keys training scripts keep the state_dict; the first that is there counts.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


@dataclass(frozen=True, eq=False)
class ForeignState:
    """A state dictionary from elsewhere."""

    tensors: dict[str, Tensor]  # on the CPU
    sha256: str  # of the file
    others: Mapping[str, Any]  # what else was beside the state dictionary in the file


def read_state(path: Path) -> ForeignState:
    """Read a state dictionary; wrappers in the file, and of its names, are taken off.

    Args:
        path: a safetensors file, or one of ``torch.save``, of which only tensors and plain values are read.

    Raises:
        DataError: the file does not exist, or has no state dictionary.
        PermissionDenied: it may not be read.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"{path}: does not exist", do="check the path") from None
    except PermissionError:
        raise PermissionDenied(f"{path}: may not be read", do="give this user read access") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}", do="pass a file with a state_dict") from None
    if len(content) > MAX_BYTES:
        raise DataError(f"{path}: is larger than {MAX_BYTES >> 30} GiB", do="pass a file with a state_dict")
    found, others = _unwrapped(_tensors(path, content))
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise DataError(
            f"{path}: contains no state_dict, expected tensors by name (also under one of {', '.join(WRAPPERS)})",
            do="save model.state_dict() with torch.save or safetensors",
        )
    if sparse := [name for name, tensor in tensors.items() if tensor.layout != torch.strided]:
        raise DataError(f"{path}: {sparse[0]} is stored as a sparse tensor", do="store it dense: tensor.to_dense()")
    return ForeignState(_without_prefixes(tensors), hashlib.sha256(content).hexdigest(), others)


def _tensors(path: Path, content: bytes) -> Any:
    try:
        if content[:4] == b"PK\x03\x04" or content[:1] == b"\x80":  # a zip archive, or the older pickle
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise DataError(
            f"{path}: is neither a safetensors file nor one of torch.save: {error}", do="pass a file with a state_dict"
        ) from None
    except Exception as error:  # a damaged or hostile file of torch.save may raise anything
        named = re.search(r"GLOBAL (\S+)", str(error))  # in two pages of text about torch.load
        reason = f"code that it names: {named[1][:80]}" if named else f"other code: {type(error).__name__}"
        raise DataError(
            f"{path}: cannot be read without running {reason}",
            do="save only model.state_dict() with torch.save, or use safetensors",
        ) from None


def _unwrapped(found: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    others: dict[str, Any] = {}
    while isinstance(found, dict):
        inner = next((key for key in WRAPPERS if isinstance(found.get(key), dict)), None)
        if inner is None:
            return found, others
        others |= {key: value for key, value in found.items() if key != inner}
        found = found[inner]
    return {}, others


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in PREFIXES * 2:
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
