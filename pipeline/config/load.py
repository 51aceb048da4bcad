"""Typed configuration: YAML with ``base:`` inheritance and ``key=value`` overrides -> :class:`Config`; surprises are refused early.

Merged in the order: schema defaults < base files < file < overrides. Every value is read as the
type that the schema gives its key, so that ``on``, ``010`` or ``nan`` are never silently something
else. Nothing here imports torch: a typo is named in a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import typing
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.checks import impossible, leaves, unworkable
from pipeline.config.keys import NONE
from pipeline.config.schema import KEYS, Config
from pipeline.config.yaml_nodes import MAX_ERRORS, Errors, Source, read_chain, read_override, read_tree
from pipeline.errors import ConfigError

REPOSITORY_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PACKAGE_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FREE_MAPPINGS = {tuple(key.name.split(".")) for key in KEYS.values() if typing.get_origin(key.kind) is dict}
PRINT = "print what a configuration resolves to with --print-config"


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Find, merge, check and return the configuration ``name`` with ``key=value`` ``overrides``.

    Raises:
        ConfigError: naming every key that is unknown, of the wrong type or impossible, with file and line.
    """
    errors = Errors()
    trees = [read_tree(Source(str(path), node), errors) for path, node in read_chain(find_config(name), find_base)]
    trees += [read_override(text, errors) for text in overrides]
    _raise(errors)
    config = _merged(name, trees)
    _raise(unworkable(config))
    return config


def config_of(name: str, values: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The configuration of ``values``, which nobody vouches for, and ``overrides``; ``name`` says where the values come from.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    _raise([f"{name}: {key}: is not a plain value" for key, value in leaves(values) if "${" in str(value)])
    return _merged(name, [values, *check_overrides(overrides)])


def check_overrides(overrides: Sequence[str]) -> list[Any]:
    """The values of every ``key=value``.

    Raises:
        ConfigError: naming every key that is unknown or of the wrong type.
    """
    errors = Errors()
    trees = [read_override(text, errors) for text in overrides]
    _raise(errors)
    return trees


def _merged(name: str, trees: Sequence[Any]) -> Config:
    try:
        merged = OmegaConf.merge(_schema(), functools.reduce(_overlay, trees, {}))
        plain = OmegaConf.to_container(merged, resolve=False, throw_on_missing=False)
        missing = [key for key, value in leaves(plain) if value == "???"]
        _raise([f"{key}: has no value, neither in the file nor as an override (write {key}=…)" for key in missing])
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(f"{name}: {key}{str(error).splitlines()[0]}", do=PRINT) from error
    assert isinstance(config, Config)
    _raise(impossible(config))
    return config


def _overlay(below: Any, above: Any, path: tuple[str, ...] = ()) -> Any:
    """``above`` over ``below``, key by key. An empty mapping clears one that has no schema, such as ``model.args``."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if not above and path[:2] in FREE_MAPPINGS:
        return {}
    return below | {
        key: _overlay(below[key], value, (*path, key)) if key in below else value for key, value in above.items()
    }


@functools.cache
def _schema() -> Any:
    """The defaults. Merging copies them."""
    return OmegaConf.structured(Config)


def find_base(name: str, file: Path) -> Path:
    """The file that the line ``base: name`` of ``file`` names: one next to it, or else what ``--config name`` finds."""
    beside = file.parent / name
    with suppress(OSError):
        if beside.exists() and not beside.is_dir():  # also what is not a regular file: reading it says so
            return beside.resolve()
    return find_config(name, asked=f"{file}: base: {name}", first=[file.parent])


def find_config(name: str, *, asked: str = "", first: Sequence[Path] = ()) -> Path:
    """The file that ``name`` names, with or without ``.yaml``.

    Searched are the folders ``first``, the current one, ./configs, the repository's and the
    package's configs; ``asked`` starts the message of the error.

    Raises:
        ConfigError: when there is none, with the nearest names.
    """
    given = Path(name)
    folders = [*first, Path.cwd(), Path.cwd() / "configs", REPOSITORY_CONFIGS, PACKAGE_CONFIGS]
    candidates = [folder / (name + suffix) for folder in folders for suffix in ("", ".yaml")]
    for candidate in candidates:
        with suppress(OSError):  # a name that is too long, a folder that may not be entered
            if candidate.is_file():
                return candidate.resolve()
    known = sorted({path.name for folder in folders[1:] if folder.is_dir() for path in folder.glob("*.yaml")})
    close = difflib.get_close_matches(given.name, known, n=3, cutoff=0.4) or known
    searched = ", ".join(dict.fromkeys(str(folder) for folder in folders))
    raise ConfigError(
        f"{asked or f'--config {name}'}: no such configuration; searched {searched}",
        do=f"choose one of {', '.join(close)}",
    )


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def config_digest(config: Config) -> str:
    """sha256 (hex) of every key that changes what is computed, but for those at their neutral value."""
    content = _compared(dataclasses.asdict(config))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """``key: old -> new`` for every key that changes what is computed; both are ``dataclasses.asdict`` of a Config.

    A key that a stored configuration does not have stands at its neutral value.
    """
    before, after = _compared(old), _compared(new)
    pairs = {name: (before.get(name, _neutral(name)), after.get(name, _neutral(name))) for name in [*before, *after]}
    return [f"{name}: {one} -> {other}" for name, (one, other) in pairs.items() if one != other]


def _compared(values: dict[str, Any]) -> dict[str, Any]:
    """By dotted name: the keys of a configuration that make two runs different, see :func:`pipeline.config.keys.key`."""
    return {
        name: value
        for name, value in leaves(values)
        if not _may_change(name) and not (name in KEYS and value == KEYS[name].neutral)
    }


def _may_change(name: str) -> bool:
    """Whether the key, or the section or free dictionary that it stands in, may change on resume."""
    while name and name not in KEYS:
        name = name.rpartition(".")[0]
    return bool(name) and KEYS[name].may_change


def _neutral(name: str) -> Any:
    neutral = KEYS[name].neutral if name in KEYS else NONE
    return None if neutral is NONE else neutral


def _raise(problems: Iterable[str]) -> None:
    told = list(islice(problems, MAX_ERRORS + 1))
    if told:
        raise ConfigError("; ".join([*told[:MAX_ERRORS], *["and more"] * (len(told) > MAX_ERRORS)]), do=PRINT)
