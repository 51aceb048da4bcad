"""YAML nodes -> values of the type that the schema gives each key, with file and line of everything that is wrong.

The scalars' own text is read, not what YAML makes of it: ``on``, ``010`` or ``nan`` are never silently something else.
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

MAX_BYTES = 1 << 17  # the largest of ours has 3 KiB, and PyYAML reads 100 KiB in a second
MAX_BASES = 16
MAX_ERRORS = 20  # that are told at once: looking for the nearest spelling of 10,000 keys takes minutes
MAX_INT = 2**63 - 1
RESOLVER = re.compile(r"\$\{[^}]*:")


class _Loader(yaml.SafeLoader):
    """Without aliases: a few lines of them describe a tree of any size, or one without end."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not used here", self.get_mark())
        return super().compose_node(parent, index)


class Errors(list[str]):
    """What is wrong, as far as it is told."""

    @property
    def is_full(self) -> bool:
        return len(self) > MAX_ERRORS

    def append(self, text: str) -> None:
        if not self.is_full:
            super().append(text)


@dataclass(frozen=True)
class Source:
    """A YAML node and where it came from."""

    origin: str
    node: yaml.Node

    @property
    def where(self) -> str:
        return (
            f"{self.origin}:{self.node.start_mark.line + 1}" if self.origin.endswith((".yaml", ".yml")) else self.origin
        )


def _compose(text: str, origin: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError(f"{origin}: nested too deeply", do="correct the file") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{origin}{line}: not YAML: {getattr(error, 'problem', None) or error}", do="correct the file"
        ) from error


def read_chain(
    path: Path, find_base: Callable[[str, Path], Path], seen: tuple[Path, ...] = ()
) -> list[tuple[Path, yaml.Node]]:
    """The file and all it is based on, the most basic first.

    ``find_base(name, path)`` is the file that the line ``base: name`` of the file ``path`` names.
    """
    if path in seen:
        raise ConfigError(f"{seen[-1]}: base: {path} leads back to itself", do="remove one of the base: lines")
    if len(seen) == MAX_BASES:
        raise ConfigError(
            f"{path}: is the base of more than {MAX_BASES} files, one upon the other", do="join some of them"
        )
    try:
        text = read_capped(path, MAX_BYTES, follow=True).decode()  # a ConfigMap's files are links
    except PermissionError:
        raise PermissionDenied(
            f"{path}: user {os.geteuid()} may not read it", do="give this user the right to read"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}", do="check the path"
        ) from error
    node = _compose(text, str(path)) or yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: holds {_shown(node)}, not keys and values", do="see configs/ for examples")
    base = [value for key, value in node.value if key.value == "base"]
    if len(base) > 1 or not all(isinstance(value, yaml.ScalarNode) and value.value for value in base):
        raise ConfigError(f"{path}: base: wants the name of one file", do="see configs/ for examples")
    rest = yaml.MappingNode(
        node.tag, [(k, v) for k, v in node.value if k.value != "base"], node.start_mark, node.end_mark
    )
    if not base:
        return [(path, rest)]
    return [*read_chain(find_base(str(base[0].value), path), find_base, (*seen, path)), (path, rest)]


def read_tree(source: Source, errors: Errors) -> Any:
    """The values of a whole file; what is wrong goes to ``errors``."""
    return _read(source, Config, "", errors)


def read_override(text: str, errors: Errors) -> Any:
    """The values of one ``key=value``; what is wrong goes to ``errors``."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        errors.append(f"override {text!r}: is not key=value")
        return {}
    node: yaml.Node = _compose(value, f"override {text}") or yaml.ScalarNode("tag:yaml.org,2002:str", "")
    for part in reversed(key.split(".")):
        node = yaml.MappingNode(
            "tag:yaml.org,2002:map", [(yaml.ScalarNode("tag:yaml.org,2002:str", part), node)], node.start_mark
        )
    return read_tree(Source(f"override {text}", node), errors)


def _read(source: Source, kind: Any, key: str, errors: Errors) -> Any:
    """The value of ``source`` as ``kind``; what is wrong goes to ``errors``."""
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
            errors.append(f"{source.where}: {key}: wants a list, has {_shown(node)}")
            return []
        return [_read(Source(source.origin, item), typing.get_args(kind)[0], key, errors) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        errors.append(f"{source.where}: {key}: wants {_kind_name(kind)}, has {_shown(node)}")
        return None
    return _read_scalar(source, kind, key, errors)


def _read_section(source: Source, kind: Any, prefix: str, errors: Errors) -> dict[str, Any]:
    if not isinstance(source.node, yaml.MappingNode):
        other = key_elsewhere_called(prefix)
        hint = f"; did you mean {other!r}?" if other else ""
        errors.append(f"{source.where}: {prefix}: wants keys and values, has {_shown(source.node)}{hint}")
        return {}
    hints = typing.get_type_hints(kind)
    section: dict[str, Any] = {}
    for key_node, value_node in source.node.value:
        key, here = str(key_node.value), Source(source.origin, key_node if key_node.start_mark else value_node)
        full = f"{prefix}.{key}" if prefix else key
        if key not in hints:
            errors.append(f"{here.where}: unknown key {full!r}{'' if errors.is_full else nearest(full)}")
        elif key in section:
            errors.append(f"{here.where}: {full}: given twice")
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
        errors.append(f"{source.where}: {key}: wants {_kind_name(kind)}, has {text!r}")
        return None
    return text


def _read_free(source: Source, key: str, errors: Errors) -> dict[str, Any]:
    """A section without a schema (model.args, train.deepspeed), as YAML reads it."""
    if not isinstance(source.node, yaml.MappingNode):
        errors.append(f"{source.where}: {key}: wants keys and values, has {_shown(source.node)}")
        return {}
    _refuse_resolvers(source, key, errors)
    constructor = yaml.SafeLoader("")
    try:
        return dict(constructor.construct_document(source.node))
    except RecursionError:
        errors.append(f"{source.where}: {key}: nested too deeply")
        return {}
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        errors.append(f"{source.where}: {key}: {(str(error).splitlines() or [''])[0]}")
        return {}


def _refuse_resolvers(source: Source, key: str, errors: Errors) -> None:
    """Only ``${other.key}`` is interpolated: a resolver such as ``${oc.env:HOME}`` would copy the environment into the run's records."""
    nodes = [source.node]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.ScalarNode) and RESOLVER.search(node.value):
            errors.append(
                f"{source.where}: {key}: {node.value!r} would copy the environment into the run's records, which is refused"
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
    """``; did you mean …?`` for a key that there is not, from its own section first, then from the whole schema."""
    prefix, _, name = full.rpartition(".")
    siblings = [key.rpartition(".")[2] for key in KEYS if key.rpartition(".")[0] == prefix]
    close = [f"{prefix}.{match}" if prefix else match for match in difflib.get_close_matches(name, siblings, n=1)]
    if other := key_elsewhere_called(name):
        return f"; did you mean {other!r}?"
    by_name = {key.rpartition(".")[2]: key for key in reversed(KEYS)}
    close = close or [by_name[match] for match in difflib.get_close_matches(name, by_name, n=1, cutoff=0.75)]
    return f"; did you mean {close[0]!r}?" if close else f"; {prefix or 'the file'} has {', '.join(siblings)}"
