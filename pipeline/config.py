"""Typed configuration: YAML with ``base:`` inheritance and ``key=value`` overrides -> :class:`Config`; surprises are refused early.

Merged in the order: schema defaults < base files < file < overrides. Every value is read as the type that the schema gives its key, so that
``on``, ``010`` or ``nan`` are never silently something else. Nothing here imports torch: a typo is named in a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import ConfigError
from pipeline.schema import (
    CHOICES,
    DEEPSPEED_KEYS,
    INCIDENTAL,
    LENGTH,
    NAME,
    RANGES,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LrConfig,
    ModelConfig,
    PhaseConfig,
    PlanConfig,
    SparsityConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LrConfig",
    "ModelConfig",
    "PhaseConfig",
    "PlanConfig",
    "SparsityConfig",
    "TrackingConfig",
    "TrainConfig",
    "config_digest",
    "differences",
    "load_config",
    "to_yaml",
]

REPOSITORY_CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PACKAGE_CONFIGS = Path(__file__).resolve().parent / "configs"
MAX_BYTES = 1 << 20
RESOLVER = re.compile(r"\$\{[^}]*:")
PRINT = "print what a configuration resolves to with --print-config"


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Find, merge, check and return the configuration ``name`` with ``key=value`` ``overrides``.

    Raises:
        ConfigError: naming every key that is unknown, of the wrong type or impossible, with file and line.
    """
    errors: list[str] = []
    trees = [_tree(_Source(str(path), node), errors) for path, node in _chain(find_config(name))]
    trees += [_override(text, errors) for text in overrides]
    _raise(errors)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), *trees)
        OmegaConf.resolve(merged)
        plain = OmegaConf.to_container(merged, throw_on_missing=False)
        missing = [key for key, value in _leaves(plain) if value == "???"]
        _raise([f"{key}: has no value, neither in the file nor as an override (write {key}=…)" for key in missing])
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {str(error).splitlines()[0]}", do=PRINT) from error
    assert isinstance(config, Config)
    _raise(list(_impossible(config)))
    return config


def find_config(name: str) -> Path:
    """``name`` as given, in ./configs, in the repository's and the package's configs, with or without ``.yaml``."""
    given = Path(name)
    folders = [Path.cwd(), Path.cwd() / "configs", REPOSITORY_CONFIGS, PACKAGE_CONFIGS]
    candidates = [folder / (name + suffix) for folder in folders for suffix in ("", ".yaml")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    known = sorted({path.name for folder in folders[1:] if folder.is_dir() for path in folder.glob("*.yaml")})
    close = difflib.get_close_matches(given.name, known, n=3, cutoff=0.4) or known
    searched = ", ".join(dict.fromkeys(str(folder) for folder in folders))
    raise ConfigError(f"--config {name}: no such configuration; searched {searched}", do=f"choose one of {', '.join(close)}")


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def config_digest(config: Config) -> str:
    """sha256 (hex) of every key that changes what is computed."""
    content = {key: value for key, value in _leaves(dataclasses.asdict(config)) if not _is_incidental(key)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """``key: old -> new`` for every key that changes what is computed; both are ``dataclasses.asdict`` of a Config."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = dict.fromkeys([*before, *after])
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if not _is_incidental(key) and before.get(key) != after.get(key)
    ]


def _is_incidental(key: str) -> bool:
    return any(key == entry or key.startswith(f"{entry}.") for entry in INCIDENTAL)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _raise(errors: list[str]) -> None:
    if errors:
        raise ConfigError("; ".join(errors), do=PRINT)


# -- reading: YAML nodes -> values of the type that the schema gives each key


@dataclass(frozen=True)
class _Source:
    """A YAML node and where it came from."""

    origin: str
    node: yaml.Node

    @property
    def where(self) -> str:
        return f"{self.origin}:{self.node.start_mark.line + 1}" if self.origin.endswith((".yaml", ".yml")) else self.origin


def _compose(text: str, origin: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{origin}{line}: not YAML: {getattr(error, 'problem', None) or error}", do="correct the file") from error


def _chain(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, yaml.Node]]:
    """The file and all it is based on, the most basic first."""
    if path in seen:
        raise ConfigError(f"{seen[-1]}: base: {path} leads back to itself", do="remove one of the base: lines")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes, hardly a configuration", do="check the path")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}", do="check the path") from error
    node = _compose(text, str(path)) or yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: holds {_shown(node)}, not keys and values", do="see configs/ for examples")
    base = [value for key, value in node.value if key.value == "base"]
    rest = yaml.MappingNode(node.tag, [(k, v) for k, v in node.value if k.value != "base"], node.start_mark, node.end_mark)
    if not base:
        return [(path, rest)]
    return [*_chain((path.parent / str(base[0].value)).resolve(), (*seen, path)), (path, rest)]


def _tree(source: _Source, errors: list[str]) -> Any:
    return _read(source, Config, "", errors)


def _override(text: str, errors: list[str]) -> Any:
    key, separator, value = text.partition("=")
    if not separator or not key:
        errors.append(f"override {text!r}: is not key=value")
        return {}
    node: yaml.Node = _compose(value, f"override {text}") or yaml.ScalarNode("tag:yaml.org,2002:str", "")
    for part in reversed(key.split(".")):
        node = yaml.MappingNode("tag:yaml.org,2002:map", [(yaml.ScalarNode("tag:yaml.org,2002:str", part), node)], node.start_mark)
    return _tree(_Source(f"override {text}", node), errors)


def _read(source: _Source, kind: Any, key: str, errors: list[str]) -> Any:
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
        return [_read(_Source(source.origin, item), typing.get_args(kind)[0], key, errors) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        errors.append(f"{source.where}: {key}: wants {_kind_name(kind)}, has {_shown(node)}")
        return None
    return _read_scalar(source, kind, key, errors)


def _read_section(source: _Source, kind: Any, prefix: str, errors: list[str]) -> dict[str, Any]:
    if not isinstance(source.node, yaml.MappingNode):
        errors.append(f"{source.where}: {prefix}: wants keys and values, has {_shown(source.node)}")
        return {}
    hints = typing.get_type_hints(kind)
    section: dict[str, Any] = {}
    for key_node, value_node in source.node.value:
        key, here = str(key_node.value), _Source(source.origin, key_node if key_node.start_mark else value_node)
        full = f"{prefix}.{key}" if prefix else key
        if key not in hints:
            errors.append(f"{here.where}: unknown key {full!r}{_nearest(full, list(hints), prefix)}")
        elif key in section:
            errors.append(f"{here.where}: {full}: given twice")
        else:
            section[key] = _read(_Source(source.origin, value_node), hints[key], full, errors)
    return section


def _read_scalar(source: _Source, kind: Any, key: str, errors: list[str]) -> Any:
    text = source.node.value
    if "${" in text or (text == "???" and kind is str):
        _refuse_resolvers(source, key, errors)
        return text
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is int:
            if text != str(int(text)):
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


def _read_free(source: _Source, key: str, errors: list[str]) -> dict[str, Any]:
    """A section without a schema (model.args, train.deepspeed), as YAML reads it."""
    if not isinstance(source.node, yaml.MappingNode):
        errors.append(f"{source.where}: {key}: wants keys and values, has {_shown(source.node)}")
        return {}
    _refuse_resolvers(source, key, errors)
    constructor = yaml.SafeLoader("")
    try:
        return dict(constructor.construct_document(source.node))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        errors.append(f"{source.where}: {key}: {str(error).splitlines()[0]}")
        return {}


def _refuse_resolvers(source: _Source, key: str, errors: list[str]) -> None:
    """Only ``${other.key}`` is interpolated: a resolver such as ``${oc.env:HOME}`` would copy the environment into the run's records."""
    nodes = [source.node]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.ScalarNode) and RESOLVER.search(node.value):
            errors.append(f"{source.where}: {key}: {node.value!r} would copy the environment into the run's records, which is refused")
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


def _nearest(full: str, siblings: list[str], prefix: str) -> str:
    """``; did you mean …?``, from the same section first, then from the whole schema."""
    name = full.rpartition(".")[2]
    close = [f"{prefix}.{match}" if prefix else match for match in difflib.get_close_matches(name, siblings, n=1)]
    by_name = {key.rpartition(".")[2]: key for key in reversed(_all_keys(Config))}
    close = close or [by_name[match] for match in difflib.get_close_matches(name, by_name, n=1, cutoff=0.75)]
    return f"; did you mean {close[0]!r}?" if close else f"; {prefix or 'the file'} has {', '.join(siblings)}"


def _all_keys(kind: Any, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(kind).items():
        inner = next((k for k in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(k)), None)
        keys += [f"{prefix}{name}", *(_all_keys(inner, f"{prefix}{name}.") if inner else [])]
    return keys


# -- what cannot be meant


def _impossible(config: Config) -> Iterator[str]:
    values = dict(_leaves(dataclasses.asdict(config)))
    for key, choices in CHOICES.items():
        if values.get(key) is not None and values[key] not in choices:
            close = difflib.get_close_matches(str(values[key]), choices, n=1)
            yield f"{key}: {values[key]!r} is none of {', '.join(choices)}" + (f"; did you mean {close[0]!r}?" if close else "")
    for key, (low, high) in RANGES.items():
        value = values.get(key)
        if value is not None and not (_above(value, low) and value <= high):
            yield f"{key}: {value} must be {low}" + (f" and <= {high:g}" if math.isfinite(high) else "")
    for key, value in values.items():
        if key.endswith((".length", ".update_interval", ".warmup", "checkpoint.every")) and value is not None:
            yield from _bad_length(key, value, may_be_zero=key.endswith(".warmup"))
    if not NAME.fullmatch(config.name):
        yield f"name: {config.name!r} must match {NAME.pattern}"
    yield from _contradictions(config)


def _above(value: float, low: str) -> bool:
    bound = float(low.lstrip(">="))
    return value >= bound if low.startswith(">=") else value > bound


def _bad_length(key: str, value: str, *, may_be_zero: bool = False) -> Iterator[str]:
    match = LENGTH.fullmatch(str(value))
    if not match:
        yield f"{key}: {value!r} is not a length such as '4000 steps', '512000 samples' or '90 epochs'"
    elif float(match[1]) == 0 and not may_be_zero:
        yield f"{key}: {value!r} must be more than 0"


def _contradictions(config: Config) -> Iterator[str]:
    plan, sparsity, train = config.plan, config.sparsity, config.train
    if train.accumulation > 0 and train.global_batch % train.accumulation:
        yield f"train.global_batch: {train.global_batch} is not a multiple of train.accumulation {train.accumulation}"
    for key in set(train.deepspeed) - set(DEEPSPEED_KEYS):
        yield f"train.deepspeed.{key}: is not passed through; allowed are {', '.join(DEEPSPEED_KEYS)}, the rest is derived from this file"
    if (sparsity.method == "dense") != (sparsity.density == 1):
        yield f"sparsity.density: {sparsity.density:g} with sparsity.method {sparsity.method!r}; the dense method is the one with density 1"
    if plan.timetable in ("dense", "static") and sparsity.method != plan.timetable:
        yield f"plan.timetable: {plan.timetable!r} goes with sparsity.method {plan.timetable!r}, not {sparsity.method!r}"
    if plan.timetable not in ("dense", "static") and sparsity.method in ("dense", "static"):
        yield f"plan.timetable: {plan.timetable!r} changes masks, sparsity.method {sparsity.method!r} does not"
    if plan.timetable not in ("dense", "static") and plan.exploration.update_interval is None:
        yield f"plan.exploration.update_interval: needed by plan.timetable {plan.timetable!r}, for instance '4000 steps'"
    if plan.timetable in ("edst", "sup_tickets") and (plan.refinement is None or plan.num_refinements < 1):
        yield f"plan.refinement, plan.num_refinements: needed by plan.timetable {plan.timetable!r}"
    if plan.exploration.opening_drop is not None:
        yield "plan.exploration.opening_drop: exploration has no ticket to escape from; only refinement phases are opened"
    if not plan.exploration.ticket and plan.timetable not in ("edst", "sup_tickets"):
        yield f"plan.exploration.ticket: the one phase of timetable {plan.timetable!r} must close with a ticket"
    if plan.refinement is not None and not plan.refinement.ticket:
        yield "plan.refinement.ticket: every refinement phase closes with a ticket"
    if plan.timetable == "sup_tickets" and not plan.exploration.ticket:
        yield "plan.exploration.ticket: the end of exploration is index 0 of Sup-tickets and cannot be false"
    if plan.dense_reference:
        yield from _bad_length("plan.dense_reference", plan.dense_reference)
    for name, phase in (("exploration", plan.exploration), ("refinement", plan.refinement)):
        for milestone in phase.lr.milestones if phase else ():
            yield from _bad_length(f"plan.{name}.lr.milestones", milestone)
    for key, values in (("data.mean", config.data.mean), ("data.std", config.data.std)):
        if len(values) != 3 or (key == "data.std" and min(values, default=0) <= 0):
            yield f"{key}: {values} must be three {'positive ' if key == 'data.std' else ''}numbers, one per colour"
