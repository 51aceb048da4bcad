"""Declare configuration keys on the fields of the schema's dataclasses. Standard library only.

:func:`key` declares a key in one line of a dataclass; :func:`keys_of` walks the dataclasses and
returns a :class:`Key` for every dotted name. The checks, the digest, the comparison on resume and
the reference page all read these keys; there is no other list of keys.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REQUIRED = "???"  # the default of a key that must be given
LENGTH_UNIT = "length"  # unit of text such as '4000 steps', '512000 samples' or '90 epochs'
NONE: Any = object()  # stands for "no neutral value"


@dataclass(frozen=True)
class Key:
    """One key of the configuration: what :func:`key` declares, with its name, type and default."""

    help: str
    unit: str = ""
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf
    may_change: bool = False
    neutral: Any = NONE
    is_path: bool = False
    name: str = ""  # dotted, from the top of the configuration
    kind: Any = None  # type annotation of the field
    default: Any = None

    @property
    def section(self) -> Any:
        """The dataclass that declares the keys below this one; None if this key is not a section."""
        return next((kind for kind in (self.kind, *typing.get_args(self.kind)) if dataclasses.is_dataclass(kind)), None)

    @property
    def bounds(self) -> str:
        """The allowed range as text, such as ``> 0 and <= 1`` or ``from 0 to 1``; empty if every number is allowed."""
        if self.above < self.at_least and self.at_most < math.inf:
            return f"from {self.at_least} to {self.at_most}"
        low = f"> {self.above}" if self.above > self.at_least else f">= {self.at_least}"
        parts = [low] if max(self.above, self.at_least) > -math.inf else []
        return " and ".join([*parts, *([f"<= {self.at_most}"] if self.at_most < math.inf else [])])

    def allows(self, number: float) -> bool:
        """Return whether ``number`` is within the bounds."""
        return self.above < number <= self.at_most and number >= self.at_least


def key(
    default: Any,
    help: str = "",
    *,
    unit: str = "",
    choices: Sequence[str] = (),
    words: Sequence[str] = (),
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    may_change: bool = False,
    neutral: Any = NONE,
    is_path: bool = False,
) -> Any:
    """Declare a configuration key.

    Example: ``smoothing: float = key(0.0, "label smoothing", at_least=0, at_most=1)``.

    **Neutral values.** Checkpoints and tickets outlive the version that wrote them, so they lack the
    keys that were added later. For such a key, ``neutral`` is the value that computes what was
    computed before the key existed. A key at its neutral value is left out of the configuration's
    digest and of the comparison on resume, so that a stored configuration without the key has the
    same digest as one with the key at that value, and can be resumed with it. Keys of version 0.1
    have no neutral value: they are in every digest. ``neutral`` stays the same when the default
    changes later. A key with ``may_change`` is in no digest and needs no neutral value.

    Args:
        default: Value used when the configuration does not set the key; a dataclass for a section,
            :data:`REQUIRED` for a key that must be set. A list or dictionary is copied.
        help: What the key does, for the reference page and ``--help-config``; for a section, the
            default is the first line of its dataclass's docstring.
        unit: Unit of a number; :data:`LENGTH_UNIT` for text such as ``90 epochs``, to whose number
            the bounds apply.
        choices: Allowed values; empty: any.
        words: Words that are allowed in place of a length.
        above: Exclusive lower bound.
        at_least: Inclusive lower bound.
        at_most: Inclusive upper bound.
        may_change: Whether a run may resume with another value, because the key does not change what
            is computed. On a section it applies to all its keys.
        neutral: The value that means "as before this key existed".
        is_path: Whether the text is a path or a URL: ``~`` at its start is replaced, ``$NAME`` is
            refused (:func:`pipeline.command_line.expand_home`).
    """
    stated = Key(help, unit, tuple(choices), tuple(words), above, at_least, at_most, may_change, neutral, is_path)
    metadata = {"key": stated}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def keys_of(section: Any, prefix: str = "", *, may_change: bool = False) -> dict[str, Key]:
    """Return every key of the dataclass ``section``, including nested sections, by dotted name in field order."""
    keys: dict[str, Key] = {}
    kinds = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        stated: Key = field.metadata["key"]
        found = dataclasses.replace(
            stated,
            name=f"{prefix}{field.name}",
            kind=kinds[field.name],
            default=field.default if field.default_factory is dataclasses.MISSING else field.default_factory(),
            may_change=may_change or stated.may_change,
        )
        if found.section and not found.help:
            found = dataclasses.replace(found, help=found.section.__doc__.partition("\n")[0])
        keys[found.name] = found
        if found.section:
            keys |= keys_of(found.section, f"{found.name}.", may_change=found.may_change)
    return keys
