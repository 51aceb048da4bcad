"""Independent judges of what the readers accepted.

Plain Python, written from the documents, without the project's own checks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import struct
import typing
from pathlib import Path
from typing import Any

from pipeline.config import schema

BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}
NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "U8": "uint8", "BOOL": "bool"}
NAMES |= {"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}


def judge_ticket(content: bytes) -> str:
    """Return what is wrong with a ticket by docs/ticket-format.md; empty if nothing is."""
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    header = json.loads(entries.pop("__metadata__")["ticket"])
    body = content[8 + length :]
    pieces = {name: body[entry["data_offsets"][0] : entry["data_offsets"][1]] for name, entry in entries.items()}
    if sum(map(len, pieces.values())) != len(body):
        return "its tensors do not fill the file"
    for name, entry in entries.items():
        if len(pieces[name]) != math.prod(entry["shape"]) * BYTES[entry["dtype"]]:
            return f"{name} has another size than its shape"
    stated = header.pop("content_sha256")
    sha = hashlib.sha256(json.dumps(header, separators=(",", ":")).encode())
    for name in sorted(entries):
        sha.update(f"\n{name} {NAMES[entries[name]['dtype']]} {entries[name]['shape']}\n".encode() + pieces[name])
    if sha.hexdigest() != stated or repr(header["format"]) not in "12":  # not True, not 1.0
        return "another digest or format"
    wanted: set[str] = set()
    for name, item in header["tensors"].items():
        if item["kind"] == "sparse":
            wanted |= {f"mask/{name}", f"values/{name}"}
            bits = int.from_bytes(pieces[f"mask/{name}"], "little")
            if bits.bit_count() * BYTES[entries[f"values/{name}"]["dtype"]] != len(
                pieces[f"values/{name}"]
            ) or bits >> math.prod(item["shape"]):
                return f"{name}: mask and values do not agree"
        else:
            wanted.add(f"dense/{name}")
            if entries[f"dense/{name}"]["shape"] != item["shape"]:
                return f"{name}: another shape"
    if wanted != set(entries):
        return "tensors too many or too few"
    for name, piece in pieces.items():
        code = {"F16": "e", "F32": "f", "F64": "d"}.get(entries[name]["dtype"])
        if code and not all(math.isfinite(value) for (value,) in struct.iter_unpack(f"<{code}", piece)):
            return f"{name} is not finite"
    of = header["provenance"]
    for key in ("index", "step", "samples_seen", "num_classes", "seed"):
        if type(of[key]) is not int or not 0 <= of[key] < 2**63:
            return f"{key} is {of[key]}"
    for key in ("epochs", "density", "r_s", *of["extra"]):
        value = of.get(key, of["extra"].get(key))
        if type(value) not in (int, float) or not math.isfinite(value):
            return f"{key} is {value}"
    if header["format"] == 2 and (problem := _judge_version_2(header)):
        return problem
    return "" if 0 <= of["density"] <= 1 and 0 <= of["r_s"] <= 1 and of["epochs"] >= 0 else "a share is none"


def _judge_version_2(header: dict[str, Any]) -> str:
    fields = {"format", "minor", "provenance", "network", "tensors"}
    if not set(header) - {"network"} <= fields and header["minor"] == 0:
        return "unknown fields"
    if type(header["minor"]) is not int or header["minor"] < 0:
        return "another minor version"
    if (network := header.get("network")) is None:
        return "" if "network" not in header else "no network"
    sizes = {name: math.prod(item["shape"]) for name, item in header["tensors"].items() if item["kind"] != "buffer"}
    if type(network["parameters"]) is not int or not 0 <= network["parameters"] <= sum(sizes.values()):
        return "parameters"
    if type(network["density"]) not in (int, float) or not 0 <= network["density"] <= 1:
        return "density of the network"
    texts = [*network["classes"], *network["dense"].values()]
    is_listed = type(network["classes"]) is list and len(network["classes"]) <= header["provenance"]["num_classes"]
    if not is_listed or not all(type(text) is str and len(text) <= 1000 for text in texts):
        return "classes or reasons"
    is_dense = all(header["tensors"].get(name, {}).get("kind") == "parameter" for name in network["dense"])
    return "" if is_dense else "a dense weight that is none"


def judge_config(config: schema.Config) -> str:
    """Return what is wrong with a configuration by its schema; empty if nothing is."""
    for key, value, kind in leaves(config, ""):
        if isinstance(value, str) and ("${" in value or value == "???"):
            return f"{key} is {value!r}"
        if not _fits(value, kind):
            return f"{key} is {value!r}, not {kind}"
    shares = [config.sparsity.density, config.data.min_scale, config.data.eval_ratio, config.evaluation.beta]
    if not all(0 < share <= 1 for share in shares):
        return f"{shares} are no shares"
    if (
        config.train.global_batch < 1
        or config.train.global_batch % config.train.accumulation
        or config.model.num_classes < 0
        or config.model.num_classes == 1
    ):
        return "impossible numbers"
    for key, stated in schema.KEYS.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part, None)
        if stated.choices and value is not None and value not in stated.choices:
            return f"{key} is {value!r}"
    return ""


def leaves(section: Any, prefix: str) -> typing.Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value, type by the schema) of a configuration."""
    hints = typing.get_type_hints(type(section))
    for entry in dataclasses.fields(section):
        value, key = getattr(section, entry.name), f"{prefix}{entry.name}"
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value, hints[entry.name]


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in arguments:
        return value is None or any(_fits(value, each) for each in arguments if each is not type(None))
    if origin is list:
        return type(value) is list and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return type(value) is dict
    if dataclasses.is_dataclass(kind):
        return isinstance(value, kind)  # type: ignore[arg-type]
    if kind is float:
        return type(value) is float and math.isfinite(value)
    return type(value) is kind and (kind is not int or abs(value) < 2**63)


def judge_beton(path: Path, num_classes: int) -> str:
    """Return what is wrong with the tables of a .beton file, by ffcv's format; empty if nothing is."""
    content = path.read_bytes()
    version, num_fields, page, num, table = struct.unpack_from("<HHIQQ", content)
    if version != 2 or num_fields != 2 or page < 1 << 21 or page & (page - 1) or table + 24 * num != len(content):
        return "header"
    first = -(-(24 + 2 * 1041 + num * 24) // page) * page  # tables, rounded up to whole pages
    placed = sorted(struct.iter_unpack("<QQQ", content[table:]), key=lambda row: row[0])
    if [sample for sample, _, _ in placed] != list(range(num)):
        return "sample ids"
    spans = []
    for index, (_, pointer, size) in enumerate(placed):
        # one row: mode, width, height and pointer without gaps, three bytes to the next multiple of eight, the label
        mode, width, height, where, label = struct.unpack_from("<BHHQ3xq", content, 24 + 2 * 1041 + index * 24)
        piece = content[pointer : pointer + size]
        is_whole = (
            piece[:2] == b"\xff\xd8" and piece[-2:] == b"\xff\xd9"
            if mode == 0
            else mode == 1 and size == 3 * width * height
        )
        if where != pointer or not width or not height or not is_whole or not 0 <= label < num_classes:
            return f"sample {index}"
        if (
            not first <= pointer < pointer + size <= table
            or (pointer - first) // page != (pointer + size - 1 - first) // page
        ):
            return f"place of sample {index}"
        spans.append((pointer, pointer + size))
    spans.sort()
    return "overlap" if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)) else ""


def judge_checkpoint(folder: Path) -> str:
    """Return what is wrong with a checkpoint's files; empty if nothing is."""
    files = json.loads((folder / "manifest.json").read_bytes())["files"]
    for name, digest in files.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            return f"{name} is not what the manifest says"
    state = json.loads((folder / "state.json").read_bytes())
    ranks = {f"rank-{rank}.safetensors" for rank in range(state["world_size"])}
    if set(files) != ranks | {"state.json", "state.safetensors"}:
        return "other files"
    numbers = [state[key] for key in ("step", "samples_seen", "world_size")] + [state.get("arithmetic", 0)]
    if not all(type(number) is int and number >= 0 for number in numbers) or repr(state["format"]) != "1":
        return "impossible numbers"
    texts = all(type(state[key]) is str for key in ("data_digest", "tracker_run"))
    return "" if texts and all(type(state[key]) is dict for key in ("config", "environment", "sparsifier")) else "types"
