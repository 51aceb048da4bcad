"""Convert YAML nodes to values of the types that the schema declares; every error has file and line.

Scalars are parsed from their text, not by YAML's own rules, which would silently turn ``on``, ``010``
or ``nan`` into something else.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.other_names import key_elsewhere_called
from pipeline.config.schema import KEYS, Config
from pipeline.errors import ConfigError, PermissionDenied
from pipeline.files import read_capped

MAX_BYTES = 1 << 17  # our largest file has 3 KiB, and PyYAML reads 100 KiB per second
MAX_BASES = 16
MAX_ERRORS = 20  # reported at once; finding the nearest spelling of 10,000 keys would take minutes
MAX_INT = 2**63 - 1
RESOLVER = re.compile(r"\$\{[^}]*:")


class _Loader(yaml.SafeLoader):
    """Reject aliases: with them a few lines can describe a huge or infinite tree."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", self.get_mark())
        return super().compose_node(parent, index)


class Errors(list[str]):
    """The first errors of a configuration; further ones are dropped."""

    @property
    def is_full(self) -> bool:
        """Whether further errors are dropped."""
        return len(self) > MAX_ERRORS

    def append(self, text: str) -> None:
        """Add an error, unless the list is full."""
        if not self.is_full:
            super().append(text)


@dataclass(frozen=True)
class Source:
    """A YAML node and where it came from."""

    origin: str
    node: yaml.Node

    @property
    def where(self) -> str:
        """File and line, or the override."""
        return (
            f"{self.origin}:{self.node.start_mark.line + 1}" if self.origin.endswith((".yaml", ".yml")) else self.origin
        )


def _compose(text: str, origin: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError(f"{origin}: is nested too deeply", do="correct the file") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{origin}{line}: is not valid YAML: {getattr(error, 'problem', None) or error}", do="correct the file"
        ) from error


def read_chain(
    path: Path, find_base: Callable[[str, Path], Path], seen: tuple[Path, ...] = ()
) -> list[tuple[Path, yaml.Node]]:
    """Read a file and its chain of bases.

    Args:
        path: the file.
        find_base: called with ``(name, path)``, finds the file for the line ``base: name`` in ``path``.
        seen: files already read, whose chain leads to ``path``.

    Returns:
        (path, content) of every file, the last base first.

    Raises:
        ConfigError: a file cannot be read, or is not a mapping.
        PermissionDenied: a file may not be read.
    """
    if path in seen:
        raise ConfigError(f"{seen[-1]}: base: {path} leads back to itself", do="remove one of the base: lines")
    if len(seen) == MAX_BASES:
        raise ConfigError(f"{path}: ends a chain of more than {MAX_BASES} files of base:", do="merge some of them")
    try:
        text = read_capped(path, MAX_BYTES, follow=True).decode()  # files of a ConfigMap are links
    except PermissionError:
        raise PermissionDenied(
            f"{path}: user {os.geteuid()} may not read it", do="give this user read access"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}", do="check the path"
        ) from error
    node = _compose(text, str(path)) or yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: expected keys and values, got {_shown(node)}", do="see configs/ for examples")
    base = [value for key, value in node.value if key.value == "base"]
    if len(base) > 1 or not all(isinstance(value, yaml.ScalarNode) and value.value for value in base):
        raise ConfigError(f"{path}: base: expected the name of one file", do="see configs/ for examples")
    rest = yaml.MappingNode(
        node.tag, [(k, v) for k, v in node.value if k.value != "base"], node.start_mark, node.end_mark
    )
    if not base:
        return [(path, rest)]
    return [*read_chain(find_base(str(base[0].value), path), find_base, (*seen, path)), (path, rest)]


def read_tree(source: Source, errors: Errors) -> Any:
    """Return the values of a whole file as nested dictionaries; problems are appended to ``errors``."""
    return _read(source, Config, "", errors)


def read_override(text: str, errors: Errors) -> Any:
    """Return the value of one ``key=value`` in nested dictionaries; problems are appended to ``errors``."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        errors.append(f"override {text!r}: expected key=value")
        return {}
    node: yaml.Node = _compose(value, f"override {text}") or yaml.ScalarNode("tag:yaml.org,2002:str", "")
    for part in reversed(key.split(".")):
        node = yaml.MappingNode(
            "tag:yaml.org,2002:map", [(yaml.ScalarNode("tag:yaml.org,2002:str", part), node)], node.start_mark
        )
    return read_tree(Source(f"override {text}", node), errors)


def _read(source: Source, kind: Any, key: str, errors: Errors) -> Any:
    """Return the value of ``source`` as type ``kind``; problems are appended to ``errors``."""
    node, origin = source.node, typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if isinstance(node, yaml.ScalarNode) and node.value in ("null", "~", ""):
            return None
        return _read(source, next(k for k in typing.get_args(kind) if k is not type(None)), key, errors)
    if dataclasses.is_dataclass(kind):
        return _read_section(source, kind, key, errors)
    if origin is dict:
        return _read_free(source, key, errors)
    if origin is list:
        if not isinstance(node, yaml.SequenceNode):
            errors.append(f"{source.where}: {key}: expected a list, got {_shown(node)}")
            return []
        return [_read(Source(source.origin, item), typing.get_args(kind)[0], key, errors) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        errors.append(f"{source.where}: {key}: expected {_kind_name(kind)}, got {_shown(node)}")
        return None
    return _read_scalar(source, kind, key, errors)


def _read_section(source: Source, kind: Any, prefix: str, errors: Errors) -> dict[str, Any]:
    if not isinstance(source.node, yaml.MappingNode):
        other = key_elsewhere_called(prefix)
        hint = f"; did you mean {other!r}?" if other else ""
        errors.append(f"{source.where}: {prefix}: expected keys and values, got {_shown(source.node)}{hint}")
        return {}
    hints = typing.get_type_hints(kind)
    section: dict[str, Any] = {}
    for key_node, value_node in source.node.value:
        key, here = str(key_node.value), Source(source.origin, key_node if key_node.start_mark else value_node)
        full = f"{prefix}.{key}" if prefix else key
        if key not in hints:
            errors.append(f"{here.where}: unknown key {full!r}{'' if errors.is_full else nearest(full)}")
        elif key in section:
            errors.append(f"{here.where}: {full}: is set twice")
        else:
            section[key] = _read(Source(source.origin, value_node), hints[key], full, errors)
    return section


def _read_scalar(source: Source, kind: Any, key: str, errors: Errors) -> Any:
    text = source.node.value
    if "${" in text or (text == "???" and kind is str):
        _refuse_resolvers(source, key, errors)
        return text
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is int:
            if text != str(int(text)) or abs(int(text)) > MAX_INT:
                raise ValueError
            return int(text)
        if kind is float:
            value = float(text)
            if not math.isfinite(value):
                raise ValueError
            return value
    except (ValueError, KeyError):
        errors.append(f"{source.where}: {key}: expected {_kind_name(kind)}, got {text!r}")
        return None
    return text


def _read_free(source: Source, key: str, errors: Errors) -> dict[str, Any]:
    """Return a section without a schema (model.args, train.deepspeed), parsed by YAML's own rules."""
    if not isinstance(source.node, yaml.MappingNode):
        errors.append(f"{source.where}: {key}: expected keys and values, got {_shown(source.node)}")
        return {}
    _refuse_resolvers(source, key, errors)
    constructor = yaml.SafeLoader("")
    try:
        return dict(constructor.construct_document(source.node))
    except RecursionError:
        errors.append(f"{source.where}: {key}: is nested too deeply")
        return {}
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        errors.append(f"{source.where}: {key}: {(str(error).splitlines() or [''])[0]}")
        return {}


def _refuse_resolvers(source: Source, key: str, errors: Errors) -> None:
    """Reject resolvers such as ``${oc.env:HOME}``; only ``${other.key}`` is interpolated.

    A resolver would copy the environment into the records of the run.
    """
    nodes = [source.node]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.ScalarNode) and RESOLVER.search(node.value):
            errors.append(
                f"{source.where}: {key}: {node.value!r} is not supported, because it would copy the environment into "
                "the records of the run"
            )
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]


def _kind_name(kind: Any) -> str:
    return {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}.get(kind, str(kind))


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "keys and values"


def nearest(full: str) -> str:
    """Return ``; did you mean …?`` for an unknown key, by its section first, then by the whole schema."""
    prefix, _, name = full.rpartition(".")
    siblings = [key.rpartition(".")[2] for key in KEYS if key.rpartition(".")[0] == prefix]
    close = [f"{prefix}.{match}" if prefix else match for match in difflib.get_close_matches(name, siblings, n=1)]
    if other := key_elsewhere_called(name):
        return f"; did you mean {other!r}?"
    by_name = {key.rpartition(".")[2]: key for key in reversed(KEYS)}
    close = close or [by_name[match] for match in difflib.get_close_matches(name, by_name, n=1, cutoff=0.75)]
    return f"; did you mean {close[0]!r}?" if close else f"; {prefix or 'the file'} has {', '.join(siblings)}"
