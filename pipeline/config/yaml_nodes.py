"""Convert YAML nodes to values of the types that the schema declares; every error has file and line.

Scalars are parsed from their text, not by YAML's own rules, which would silently turn ``on``, ``010``
or ``nan`` into something else.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.command_line import expand_home
from pipeline.config.other_names import key_elsewhere_called
from pipeline.config.schema import KEYS, Config
from pipeline.errors import ConfigError, PermissionDenied
from pipeline.files import MAX_DIGITS, read_capped

MAX_BYTES = 1 << 17  # our largest file has 3 KiB, and PyYAML reads 100 KiB per second
MAX_BASES = 16
MAX_ERRORS = 20  # reported at once; finding the nearest spelling of 10,000 keys would take minutes
MAX_INT = 2**63 - 1
MAPPING = "a mapping (key: value pairs)"
OVERRIDE = "override "  # how the origin of a value begins that a ``key=value`` gave
RESOLVER = re.compile(r"\$\{[^}]*:")
_HALF = re.compile("[\\ud800-\\udfff]")  # of a surrogate pair: no file could hold it
_LIBRARY_WORDS = (  # what PyYAML says, and what we say
    (r"unacceptable character #x([0-9a-f]{4}).*", r"the character U+\1 is not allowed"),
    (r"but got '<stream end>'", "but the text ends"),
    (r"found character '\\t' that cannot start any token", "a tab is used where only spaces are allowed"),
    (r"could not determine a constructor for the tag 'tag:yaml.org,2002:(.*)'", r"the tag !!\1 is not supported"),
    (r"could not determine a constructor for the tag '(.*)'", r"the tag \1 is not supported"),
)


class _AliasError(yaml.composer.ComposerError):
    """The text uses an alias."""


class _Loader(yaml.SafeLoader):
    """Reject aliases: with them a few lines can describe a huge or infinite tree."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise _AliasError(
                None, None, f"uses a YAML alias (*{event.anchor}), which is not supported", event.start_mark
            )
        return super().compose_node(parent, index)


class Errors(list[str]):
    """The first errors of a configuration; further ones are only counted."""

    num_dropped = 0

    @property
    def is_full(self) -> bool:
        """Whether further errors are dropped."""
        return len(self) >= MAX_ERRORS

    def append(self, text: str) -> None:
        """Add an error; count it if the list is full."""
        if self.is_full:
            self.num_dropped += 1
        else:
            super().append(text)


@dataclass(frozen=True)
class Source:
    """A YAML node and where it came from."""

    origin: str
    node: yaml.Node

    @property
    def where(self) -> str:
        """File and line, or the override."""
        return _at_line(self.origin, self.node.start_mark)


def _at_line(origin: str, mark: Any) -> str:
    """Add the line of ``mark`` to a file; an override has only one."""
    is_file = not origin.startswith(OVERRIDE)
    return f"{origin}:{mark.line + 1}" if is_file and mark else origin


def _compose(text: str, origin: str) -> yaml.Node | None:
    do = "correct the override" if origin.startswith(OVERRIDE) else "correct the file"
    try:
        return yaml.compose(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError(f"{origin}: is nested too deeply", do=do) from None
    except _AliasError as error:
        raise ConfigError(
            f"{_at_line(origin, error.problem_mark)}: {error.problem}", do="write out the value in place of the alias"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        where = _at_line(origin, getattr(error, "problem_mark", None))
        raise ConfigError(f"{where}: is not valid YAML: {_in_our_words(error)}", do=do) from error


def _in_our_words(error: Exception) -> str:
    """Return what the YAML library found, on one line, in words that a user knows."""
    text = getattr(error, "problem", None) or (str(error).splitlines() or [""])[0]
    for pattern, words in _LIBRARY_WORDS:
        text = re.sub(pattern, words, text)
    return str(text)


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
        loop = " → ".join(file.name for file in (*seen[seen.index(path) :], path))
        raise ConfigError(f"{seen[-1]}: the base: lines form a loop: {loop}", do="remove one of them")
    if len(seen) == MAX_BASES:
        raise ConfigError(f"{path}: the chain of base: files is longer than {MAX_BASES}", do="merge some of them")
    asked = f"{seen[-1]}: base: " if seen else ""
    try:
        content = read_capped(path, MAX_BYTES, follow=True)  # files of a ConfigMap are links
    except PermissionError:
        raise PermissionDenied(
            f"{asked}{path}: user {os.geteuid()} may not read it", do="give this user read access"
        ) from None
    except OSError as error:
        raise ConfigError(f"{asked}{path}: cannot be read: {error.strerror}", do="check the path") from error
    except ValueError as error:  # "it is …"
        what = str(error).removeprefix("it ")
        raise ConfigError(f"{asked}{path}: {what}", do="pass the YAML file of a configuration") from None
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{asked}{path}: is not UTF-8 text (byte 0x{content[error.start]:02x} at position {error.start})",
            do="save it as UTF-8",
        ) from None
    node = _compose(text, str(path)) or yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{asked}{path}: expected {MAPPING}, got {_shown(node)}", do="see configs/ for examples")
    base = [value for key, value in node.value if key.value == "base"]
    if len(base) > 1 or not all(isinstance(value, yaml.ScalarNode) and value.value for value in base):
        got = _shown(base[0]) if len(base) == 1 else f"{len(base)} base: lines"
        raise ConfigError(f"{path}: base: expected one file name, got {got}", do="write base: NAME.yaml")
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
    origin = f"{OVERRIDE}{text!r}"
    key, separator, value = text.partition("=")
    if not separator or not key:
        errors.append(f"command line: expected key=value, got {text!r}")
        return {}
    node: yaml.Node = _compose(value, origin) or yaml.ScalarNode("tag:yaml.org,2002:str", "")
    for part in reversed(key.split(".")):
        node = yaml.MappingNode(
            "tag:yaml.org,2002:map", [(yaml.ScalarNode("tag:yaml.org,2002:str", part), node)], node.start_mark
        )
    return read_tree(Source(origin, node), errors)


def _read(source: Source, kind: Any, key: str, errors: Errors, *, is_entry: bool = False) -> Any:
    """Return the value of ``source`` as type ``kind``; problems are appended to ``errors``.

    Args:
        source: where the value is.
        kind: the type that the schema declares.
        key: the dotted name.
        errors: problems are appended.
        is_entry: whether the value is an entry of the list ``key``.
    """
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
            hint = f"; write [{node.value}]" if isinstance(node, yaml.ScalarNode) else ""
            errors.append(f"{source.where}: {key}: expected a list, got {_shown(node)}{hint}")
            return []
        entry = typing.get_args(kind)[0]
        return [_read(Source(source.origin, item), entry, key, errors, is_entry=True) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        errors.append(f"{source.where}: {key}: expected {of_entry(is_entry)}{_kind_name(kind)}, got {_shown(node)}")
        return None
    return _read_scalar(source, kind, key, errors, is_entry=is_entry)


def _read_section(source: Source, kind: Any, prefix: str, errors: Errors) -> dict[str, Any]:
    if not isinstance(source.node, yaml.MappingNode):
        other = key_elsewhere_called(prefix)
        hint = f"; did you mean {other!r}?" if other else ""
        errors.append(f"{source.where}: {prefix}: expected {MAPPING}, got {_shown(source.node)}{hint}")
        return {}
    hints = typing.get_type_hints(kind)
    section: dict[str, Any] = {}
    for key_node, value_node in source.node.value:
        key, here = str(key_node.value), Source(source.origin, key_node if key_node.start_mark else value_node)
        full = f"{prefix}.{key}" if prefix else key
        if key not in hints:
            errors.append(f"{here.where}: unknown key {full!r}{'' if errors.is_full else nearest(full)}")
        elif key in section:
            errors.append(f"{here.where}: {full}: is set twice; remove one of the two")
        else:
            section[key] = _read(Source(source.origin, value_node), hints[key], full, errors)
    return section


def _read_scalar(source: Source, kind: Any, key: str, errors: Errors, *, is_entry: bool) -> Any:
    text, entry = source.node.value, of_entry(is_entry)
    if "${" in text or (text == "???" and kind is str):
        _refuse_resolvers(source, key, errors)
        return _expanded(source, key, errors)
    if half := _HALF.search(text):
        errors.append(f"{source.where}: {key}: contains an unpaired surrogate ({half[0]})")
        return None
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is int:
            if not re.fullmatch("0|-?[1-9][0-9]*", text):
                raise _OutOfForm("a whole number written in digits 0–9 without leading zeros, such as 1000")
            if len(text) > MAX_DIGITS or abs(int(text)) > MAX_INT:
                errors.append(f"{source.where}: {key}: {text!r} is too {'small' if text[0] == '-' else 'large'}")
                return None
            return int(text)
        if kind is float:
            value = float(text)
            if not math.isfinite(value):
                raise ValueError
            if value == 0 and re.search("[1-9]", text.lower().partition("e")[0]):
                errors.append(f"{source.where}: {key}: {text!r} is too small and would be rounded to 0")
                return None
            return value
    except _OutOfForm as error:
        errors.append(f"{source.where}: {key}: expected {entry}{error}, got {text!r}")
        return None
    except (ValueError, KeyError):
        errors.append(f"{source.where}: {key}: expected {entry}{_kind_name(kind)}, got {text!r}")
        return None
    return _expanded(source, key, errors)


def _expanded(source: Source, key: str, errors: Errors) -> str:
    """Return the text, with ``~`` replaced where the key is a path."""
    text = str(source.node.value)
    try:
        return expand_home(text, interpolates=True) if key in KEYS and KEYS[key].is_path else text
    except ValueError as error:
        errors.append(f"{source.where}: {key}: {error}")
        return text


class _OutOfForm(ValueError):
    """A number that is not written as expected; the text says what is expected."""


def _read_free(source: Source, key: str, errors: Errors) -> dict[str, Any]:
    """Return a section without a schema (model.args, train.deepspeed), parsed by YAML's own rules."""
    if not isinstance(source.node, yaml.MappingNode):
        is_null = isinstance(source.node, yaml.ScalarNode) and source.node.value in ("null", "~", "")
        hint = "; write {} to clear it" if is_null else ""
        errors.append(f"{source.where}: {key}: expected {MAPPING}, got {_shown(source.node)}{hint}")
        return {}
    _refuse_resolvers(source, key, errors)
    constructor = yaml.SafeLoader("")
    try:
        section = dict(constructor.construct_document(source.node))
    except RecursionError:
        errors.append(f"{source.where}: {key}: is nested too deeply")
        return {}
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        errors.append(f"{source.where}: {key}: {_in_our_words(error)}")
        return {}
    problems = list(_unsupported(section, key))
    for problem in problems:
        errors.append(f"{source.where}: {problem}")
    return {} if problems else section


def _unsupported(value: Any, key: str) -> Iterator[str]:
    """Yield a line for every key that is not text, and every value that JSON does not have."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                yield f"{key}: keys must be text; write '{name}' instead of {name}"
            yield from _unsupported(item, f"{key}.{name}")
    elif isinstance(value, list):
        for item in value:
            yield from _unsupported(item, key)
    elif isinstance(value, datetime.date):
        yield f"{key}: a date is not supported; put it in quotes"
    elif isinstance(value, str) and (half := _HALF.search(value)):
        yield f"{key}: contains an unpaired surrogate ({half[0]})"
    elif value is not None and not isinstance(value, bool | int | float | str):
        yield f"{key}: a value of type {type(value).__name__} is not supported"


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
                "the records of the run; write the value itself"
            )
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]


def of_entry(is_entry: bool) -> str:
    """Return what follows ``expected`` where a value is an entry of a list."""
    return "every entry to be " if is_entry else ""


def _kind_name(kind: Any) -> str:
    return {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}.get(kind, str(kind))


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else MAPPING


def nearest(full: str) -> str:
    """Return ``; did you mean …?`` for an unknown key, by its section first, then by the whole schema."""
    prefix, _, name = full.rpartition(".")
    siblings = [key.rpartition(".")[2] for key in KEYS if key.rpartition(".")[0] == prefix]
    close = [f"{prefix}.{match}" if prefix else match for match in difflib.get_close_matches(name, siblings, n=1)]
    if other := key_elsewhere_called(name):
        return f"; did you mean {other!r}?"
    by_name = {key.rpartition(".")[2]: key for key in reversed(KEYS)}
    close = close or [by_name[match] for match in difflib.get_close_matches(name, by_name, n=1, cutoff=0.75)]
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(siblings)}"
