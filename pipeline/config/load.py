"""Load a typed :class:`Config` from YAML with ``base:`` inheritance and ``key=value`` overrides.

Values are merged in this order, and later ones win: schema defaults, base files, file, overrides.
Every value is read as the type that the schema declares for its key, so that YAML cannot turn
``on``, ``010`` or ``nan`` into something else. Does not import torch, so that a typo is reported
within a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import re
import typing
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline import parts
from pipeline.command_line import expand_home
from pipeline.config.checks import impossible, leaves, unworkable
from pipeline.config.keys import NONE
from pipeline.config.schema import KEYS, Config
from pipeline.config.yaml_nodes import MAX_ERRORS, OVERRIDE, Errors, Source, read_chain, read_override, read_tree
from pipeline.errors import ConfigError
from pipeline.redaction import printable

REPOSITORY_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PACKAGE_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FREE_MAPPINGS = {tuple(key.name.split(".")) for key in KEYS.values() if typing.get_origin(key.kind) is dict}
SELECTING = ("evaluation.every", "evaluation.held_out_images")  # change results only if tickets.select is not last
EXPLAINS = "launchers/train.py --help-config"
_LIBRARY_WORDS = (  # what OmegaConf says, and what we say
    (
        r"Interpolation key '([A-Z_]+)' not found",
        r"${\1} is not a key (variables are not expanded); write the value",
    ),
    (r"Interpolation key '(.*)' not found", r"${\1} refers to a key that does not exist"),
    (r"Recursive interpolation detected", "refers to itself"),
)


def load_config(name: str, overrides: Sequence[str] = (), *, may_import: bool = True) -> Config:
    """Find, merge, check and return the configuration ``name`` with ``key=value`` ``overrides``.

    Packages of own parts (``imports``) are imported first. Without ``may_import``, for files that are
    not the caller's own, they must have been imported already.

    Raises:
        ConfigError: keys are unknown, or values invalid; names each of them with file and line.
    """
    errors = Errors()
    trees = [read_tree(Source(str(path), node), errors) for path, node in read_chain(find_config(name), find_base)]
    trees += [read_override(text, errors) for text in overrides]
    _raise(errors)
    config = _merged(name, trees, overrides, may_import=may_import)
    _raise(unworkable(config))
    return config


def config_of(name: str, values: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Build the configuration of untrusted ``values`` and ``overrides``.

    Args:
        name: where the values come from, for errors.
        values: nested dictionaries.
        overrides: ``key=value`` texts.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    _raise([f"{name}: {key}: must not contain ${{…}}" for key, value in leaves(values) if "${" in str(value)])
    return _merged(name, [values, *check_overrides(overrides)], overrides, may_import=False)


def check_overrides(overrides: Sequence[str]) -> list[Any]:
    """Return the values of every ``key=value``, each as a nested dictionary.

    Raises:
        ConfigError: keys are unknown, or values have the wrong type; names each of them.
    """
    errors = Errors()
    trees = [read_override(text, errors) for text in overrides]
    _raise(errors)
    return trees


def _merged(name: str, trees: Sequence[Any], overrides: Sequence[str], *, may_import: bool = True) -> Config:
    """Merge the ``trees``, of which the last come from ``overrides``, and check the result.

    Packages of own parts are imported only with ``may_import``: a file never chooses code.
    """
    try:
        merged = OmegaConf.merge(_schema(), functools.reduce(_overlay, trees, {}))
        plain = OmegaConf.to_container(merged, resolve=False, throw_on_missing=False)
        missing = [key for key, value in leaves(plain) if value == "???"]
        _raise([f"{key}: is required; set it in {name} or on the command line ({key}=…)" for key in missing])
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "")
        set_by = (text for text in reversed(overrides) if f"{key}.".startswith(f"{text.partition('=')[0]}."))
        where = next((f"{OVERRIDE}{text!r}" for text in set_by), name)
        words = str(error).splitlines()[0]
        for pattern, ours in _LIBRARY_WORDS:
            words = re.sub(pattern, ours, words)
        what = f"{where}: {key}: {words}" if key else f"{where}: {words}"
        raise ConfigError(what, do=_advice([what])) from error
    assert isinstance(config, Config)
    if may_import:
        parts.import_parts(config.imports)
    elif absent := parts.missing_of({parts.IMPORTS: dict.fromkeys(config.imports)}):
        raise ConfigError(f"{name}: imports: needs {absent}, which a file cannot load", do=f"pass --imports {absent}")
    _raise(impossible(config))
    return config


def _overlay(below: Any, above: Any, path: tuple[str, ...] = ()) -> Any:
    """Merge ``above`` over ``below``, key by key. An empty mapping clears one without a schema (``model.args``)."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if not above and path[:2] in FREE_MAPPINGS:
        return {}
    return below | {
        key: _overlay(below[key], value, (*path, key)) if key in below else value for key, value in above.items()
    }


@functools.cache
def _schema() -> Any:
    """Return the defaults; they are cached, and merging copies them."""
    return OmegaConf.structured(Config)


def find_base(name: str, file: Path) -> Path:
    """Find the file for the line ``base: name`` in ``file``: in the same folder, or else where ``--config`` looks."""
    return find_config(name, asked=f"{file}: base: {name}", first=[file.parent])


def find_config(name: str, *, asked: str = "", first: Sequence[Path] = ()) -> Path:
    """Find the configuration file ``name``, with or without ``.yaml``.

    It is looked for in the folders ``first``, then in the current folder, its ``configs/``, and the
    ``configs/`` of the repository and of the package.

    Args:
        name: path or name of a file.
        asked: what asked for the file, for the error.
        first: folders to look in first.

    Raises:
        ConfigError: there is no such file, for which similar names are suggested; or it is a folder, FIFO or device.
    """
    asked = asked or f"--config {printable(name, max_characters=200)}"
    try:
        name = expand_home(name)
    except ValueError as error:
        raise ConfigError(f"{asked}: {error}") from None
    given = Path(name)
    folders = [*first, Path.cwd(), Path.cwd() / "configs", REPOSITORY_CONFIGS, PACKAGE_CONFIGS]
    candidates = [folder / (name + suffix) for folder in folders for suffix in ("", ".yaml")]
    others = []
    for candidate in candidates:
        with suppress(OSError):  # the name is too long, or the folder may not be entered
            if candidate.is_file():
                return candidate.resolve()
            others += [candidate] if candidate.exists() else []
    if others:
        where = "" if given.is_absolute() else f"{others[0]}: "
        raise ConfigError(f"{asked}: {where}is not a regular file", do="pass the YAML file of a configuration")
    known = sorted({path.name for folder in folders[1:] if folder.is_dir() for path in folder.glob("[!.]*.yaml")})
    close = difflib.get_close_matches(given.name, known, n=3, cutoff=0.4) or known
    searched = ", ".join(dict.fromkeys(str(folder) for folder in folders))
    raise ConfigError(
        f"{asked}: {'does not exist' if given.is_absolute() else f'not found in {searched}'}",
        do=f"pass an existing file, such as {', '.join(close)}",
    )


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML, which :func:`load_config` can read."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def config_digest(config: Config) -> str:
    """Return the sha256 (hex) of all keys that change what is computed, without those at their neutral value."""
    content = _compared(dataclasses.asdict(config))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List ``key: old -> new`` for every key that differs and changes what is computed.

    Args:
        old: ``dataclasses.asdict`` of a Config, possibly stored by an older version. A key that it
            lacks has its neutral value.
        new: ``dataclasses.asdict`` of a Config.
    """
    before, after = _compared(old), _compared(new)
    for name in SELECTING:
        if not (name in before and name in after):  # one of the two runs selects nothing
            before.pop(name, None), after.pop(name, None)
    pairs = {name: (before.get(name, _neutral(name)), after.get(name, _neutral(name))) for name in [*before, *after]}
    return [f"{name}: {one} -> {other}" for name, (one, other) in pairs.items() if one != other]


def _compared(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that decide whether two runs are equal, by dotted name (:func:`pipeline.config.keys.key`)."""
    every = dict(leaves(values))
    selecting = SELECTING if every.get("tickets.select", "last") != "last" else ()
    return {
        name: value
        for name, value in every.items()
        if name in selecting or (not _may_change(name) and not (name in KEYS and value == KEYS[name].neutral))
    }


def _may_change(name: str) -> bool:
    """Return whether a key may change on resume; a key without a declaration follows the section it is in."""
    while name and name not in KEYS:
        name = name.rpartition(".")[0]
    return bool(name) and KEYS[name].may_change


def _neutral(name: str) -> Any:
    neutral = KEYS[name].neutral if name in KEYS else NONE
    return None if neutral is NONE else neutral


def _raise(problems: Iterable[str]) -> None:
    rest = iter(problems)
    reported = list(islice(rest, MAX_ERRORS))
    if reported:
        num_more = sum(1 for _ in rest) + getattr(problems, "num_dropped", 0)
        more = [f"and {num_more} more"] if num_more else []
        raise ConfigError("; ".join([*reported, *more]), do=_advice(reported))


def _advice(problems: Sequence[str]) -> str:
    """Return what to do about ``problems``; empty if the only one says it after a semicolon."""
    if len(problems) > 1:
        return f"correct them; {EXPLAINS} KEY explains a key"
    if "; " in problems[0]:
        return ""
    name = (re.findall(r"(?:^|[:,] )([\w.]+): ", problems[0]) or [""])[0]
    while name and name not in KEYS:
        name = name.rpartition(".")[0]
    return f"correct it; {EXPLAINS} {name} explains the key" if name else f"correct it; {EXPLAINS} lists the keys"
