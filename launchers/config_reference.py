"""The reference of the configuration, from its schema: ``docs/configuration.md`` and ``--help-config``.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from pipeline.config.keys import LENGTH_UNIT, NONE, REQUIRED, Key
from pipeline.config.schema import KEYS, Config
from pipeline.config.timetables import TIMETABLES
from pipeline.config.yaml_nodes import nearest
from pipeline.errors import ConfigError
from pipeline.schedules import length_in_steps

WIDTH = 100
TOP = "The run"  # the title of the keys that are in no section
FILES = """
A configuration is a YAML file: a mapping of keys to values. `--config NAME` takes a path, or the name of a
file in the current folder, in `configs/` of the current folder, in the repository's `configs/`, or
in those that the installed package brings, with or without `.yaml`.

`base: NAME` in a file names another file that it is based on: one in its own folder, or else one
that `--config NAME` finds. Values are merged in this order, and the last one counts: the defaults
below, the base and its own bases, the file, and `key=value` of the command line, such as
`sparsity.density=0.2` or `train.betas='[0.9, 0.95]'`. `${seed}` in a value stands for the value of
another key. `~` at the start of a path stands for the home folder; environment variables are not
expanded. Keys below `model.args` and `train.deepspeed` are added to those of the files before; an
empty mapping, such as `model.args={}`, clears them first.

`--print-config` prints what all of this results in, `--check` checks it, and `--help-config KEY`
prints one key or section of this page.

A *length* is text with a unit: `4000 steps`, `512000 samples` or `90 epochs`. A key that is *fixed*
cannot change when a run resumes, because it changes what is computed; `--allow-change KEY` permits
it all the same. The others *may change*.
"""
SCALING = """
A recipe is written for `plan.reference_batch` samples per step and runs at any
`train.global_batch`. Every learning rate is multiplied by global_batch / reference_batch. A length
in steps keeps its number of samples, so the number of steps is divided by the same factor. Epochs
and samples stay what they are.

For example, with `plan.reference_batch` {reference}, `train.global_batch` {batch} and
{steps_per_epoch} steps per epoch: a learning rate of {lr:g} becomes {scaled_lr:g}, `{steps}` become
{scaled_steps} steps, `{samples}` are {scaled_samples} steps, and `{epochs}` are {scaled_epochs}
steps.
"""


def reference(name: str = "") -> str:
    """The reference as text: of one key, of one section, or of everything.

    Raises:
        ConfigError: there is no such key, with the nearest spelling.
    """
    if not name:
        parts = [f"{title.upper()}\n{_wrapped(text)}" for title, text in _chapters()]
        return "\n\n".join([*parts, *(_section_text(*section) for section in _sections())]) + "\n"
    if name not in KEYS:
        raise ConfigError(
            f"--help-config: unknown key {name!r}{nearest(name)}", do="see all keys with --help-config, without a key"
        )
    if not KEYS[name].section:
        return _key_text(KEYS[name]) + "\n"
    parents = [name, *(key.name for key in KEYS.values() if key.section and key.name.startswith(f"{name}."))]
    return "\n\n".join(_section_text(parent, _keys_in(parent)) for parent in parents) + "\n"


def markdown() -> str:
    """The whole of ``docs/configuration.md``."""
    made_by = (
        "<!-- Made from pipeline/config/schema.py by `python -m tools.configuration_reference`: change it there. -->"
    )
    parts = [f"# Configuration\n\n{made_by}"]
    parts += [f"## {title}\n\n{_wrapped(text)}" for title, text in _chapters()]
    parts.append("## Keys")
    for name, keys in _sections():
        rows = "\n".join(_row(key) for key in keys)
        head = "| key | type | default | allowed | on resume | what it does |\n|---|---|---|---|---|---|"
        parts.append(f"### {name or TOP}\n\n{_wrapped(_about(name))}\n\n{head}\n{rows}")
    return "\n\n".join(parts) + "\n"


def _chapters() -> Iterator[tuple[str, str]]:
    """(title, paragraphs) of what is to be said before the keys."""
    yield "Files and overrides", FILES
    needs = "\n".join(f"- `{name}`: {timetable.about}." for name, timetable in TIMETABLES.items())
    yield "Timetables", f"`plan.timetable` names the order of the phases.\n\n{needs}"
    at = {"steps_per_epoch": 1251, "global_batch": 1024, "reference_batch": 128}
    lengths = {"steps": "4000 steps", "samples": "512000 samples", "epochs": "90 epochs"}
    lr = 0.1
    yield (
        "The scaling rule",
        SCALING.format(
            reference=at["reference_batch"],
            batch=at["global_batch"],
            steps_per_epoch=at["steps_per_epoch"],
            lr=lr,
            scaled_lr=lr * at["global_batch"] / at["reference_batch"],
            **lengths,
            **{f"scaled_{unit}": length_in_steps(length, **at) for unit, length in lengths.items()},
        ),
    )


def _sections() -> Iterator[tuple[str, list[Key]]]:
    """(dotted name, keys) of every section, but those whose kind was listed before."""
    seen: list[Any] = []
    for name in ["", *(key.name for key in KEYS.values() if key.section)]:
        kind = KEYS[name].section if name else Config
        if kind not in seen:
            seen.append(kind)
            yield name, _keys_in(name)


def _keys_in(section: str) -> list[Key]:
    """The keys of the section itself; of the top those that are no sections."""
    return [key for key in KEYS.values() if key.name.rpartition(".")[0] == section and (section or not key.section)]


def _about(section: str) -> str:
    """What the section is for, and which others have the same keys."""
    if not section:
        return "Keys of the run itself."
    kind = KEYS[section].section
    others = [f"`{key.name}`" for key in KEYS.values() if key.section is kind and key.name != section]
    same = f" The same keys are in {', '.join(others)}." if others else ""
    return " ".join((kind.__doc__ or "").replace("``", "`").replace(":mod:", "").split()) + same


def _section_text(section: str, keys: list[Key]) -> str:
    return "\n".join([f"{section or TOP.upper()}\n{_wrapped(_about(section))}", *map(_key_text, keys)])


def _key_text(key: Key) -> str:
    default = _default(key)
    stated = [_type(key), f"default {default}" if default else "required", _allowed(key), _on_resume(key)]
    if key.section and default != "null":
        stated = ["section"]
    lines = [f"  {key.name}: {'; '.join(filter(None, stated))}", key.help]
    return "\n".join(
        textwrap.fill(line, WIDTH, initial_indent=indent, subsequent_indent="      ", break_on_hyphens=False)
        for line, indent in zip(lines, ("", "      "), strict=True)
    )


def _row(key: Key) -> str:
    allowed = ", ".join(f"`{choice}`" for choice in key.choices) or key.bounds.replace("<", "\\<").replace(">", "\\>")
    allowed += "".join(f", or `{word}`" for word in key.words)
    default = f"`{_default(key)}`" if _default(key) else "required" if key.default == REQUIRED else ""
    cells = [f"`{key.name}`", _type(key), default, allowed, _on_resume(key), key.help]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _type(key: Key) -> str:
    kind, is_optional = key.kind, False
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        is_optional = True
        kind = next(each for each in typing.get_args(kind) if each is not type(None))
    if key.section:
        name = "section"
    elif key.unit == LENGTH_UNIT:
        name = "list of lengths" if typing.get_origin(kind) is list else "length"
    else:
        names: dict[Any, str] = {bool: "true or false", int: "whole number", float: "number", str: "text"}
        names |= {
            list[int]: "list of whole numbers",
            list[float]: "list of numbers",
            list[str]: "list of texts",
            dict[str, Any]: "mapping",
        }
        name = names[kind]
        name += f" ({key.unit})" if key.unit else ""
    return f"{name}, or null" if is_optional else name


def _default(key: Key) -> str:
    """As YAML; empty for a key that must be given, and for a section that is always there."""
    if key.default == REQUIRED or (key.section and key.default is not None):
        return ""
    return key.default if isinstance(key.default, str) and key.default else json.dumps(key.default)


def _allowed(key: Key) -> str:
    allowed = f"one of {', '.join(key.choices)}" if key.choices else key.bounds
    return allowed + "".join(f", or {word}" for word in key.words)


def _on_resume(key: Key) -> str:
    if key.may_change:
        return "may change"
    return "fixed" if key.neutral is NONE else f"fixed, neutral value {json.dumps(key.neutral)}"


def _wrapped(text: str) -> str:
    """Every paragraph filled; list items keep together."""
    filled = []
    for block in text.strip().split("\n\n"):
        items = ("\n" + block).split("\n- ") if block.startswith("- ") else [block]
        marks = ["- " if block.startswith("- ") else ""] * len(items)
        lines = [
            textwrap.fill(
                " ".join(item.split()),
                WIDTH,
                initial_indent=mark,
                subsequent_indent=" " * len(mark),
                break_on_hyphens=False,
                break_long_words=False,
            )
            for item, mark in zip(items, marks, strict=True)
            if item.strip()
        ]
        filled.append("\n".join(lines))
    return "\n\n".join(filled)
