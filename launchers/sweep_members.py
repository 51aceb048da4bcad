"""What a sweep consists of: axes, the member runs that are their product, and ``sweep.json``, which records both."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.load import differences
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, IntegrityError, WriteError
from pipeline.files import at_work_in, cannot_read, parse_json, read_capped, why_malformed, write_atomically
from pipeline.redaction import redact_all
from pipeline.training import run_record

RECORD, LOG = "sweep.json", "sweep.log"  # in the sweep's folder; in each member's folder
# Folder of the sweep's own run in MLflow. It lies beside the members, so that all share one local store.
PARENT = "sweep"
VARIANT = "variant"  # name of the axis of --variant
MAX_RECORD_BYTES = 1 << 28
MAX_NAME = 200  # characters; file systems allow 255 bytes
SET_BY_SWEEP = {"seed": "--seeds", "output_dir": "--output"}
OTHER_OUTPUT = "choose another --output"
_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "\"'"
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9.+-]+")


@dataclass(frozen=True)
class Axis:
    """What varies between the combinations of a sweep: a key of the configuration, or a choice of variants."""

    name: str  # last part of the key, or the whole key where another axis has the same last part
    values: Mapping[str, tuple[str, ...]]  # value as given, or name of a variant -> settings key=value


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    values: Mapping[str, str]  # name of the axis -> value
    seed: int
    config: Config  # with which launchers/train.py starts
    settings: tuple[str, ...]  # key=value, for its command line

    @property
    def combination(self) -> str:
        """What the member shares with those of other seeds, such as ``method=set,density=0.05``."""
        return combination_of(self.values)

    @property
    def name(self) -> str:
        """Name of its folder, such as ``method=set,density=0.05,seed=0``."""
        return f"{self.combination},seed={self.seed}".removeprefix(",")


def combination_of(values: Mapping[str, str]) -> str:
    """Return the name of a combination of values, as far as a folder can be called so."""
    return ",".join(f"{name}={_NOT_IN_NAMES.sub('_', value).strip('_')}" for name, value in values.items())


def find_combination(baseline: str, combinations: Iterable[str]) -> str:
    """Return the combination with the values of ``baseline``, in any order; empty: the first one.

    Raises:
        ConfigError: there is no such combination.
    """
    known = list(dict.fromkeys(combinations))
    wanted = sorted(part.strip() for part in baseline.split(","))
    found = [each for each in known if not baseline or sorted(each.split(",")) == wanted]
    if not found:
        raise ConfigError(f"--baseline {baseline}: is not a combination of this sweep", do=f"use {' or '.join(known)}")
    return found[0]


def chosen(members: Sequence[Member], only: Sequence[str]) -> list[Member]:
    """Return the members with all values of one of the texts such as ``method=set,seed=0``; all if there is no text.

    Raises:
        ConfigError: a text chooses no member.
    """
    found: dict[str, Member] = {} if only else {member.name: member for member in members}
    for text in only:
        wanted = {part.strip() for part in text.split(",")}
        those = {member.name: member for member in members if wanted <= set(member.name.split(","))}
        if not those:
            raise ConfigError(f"--only {text}: chooses no run", do=f"write values as in {members[0].name}")
        found |= those
    return [member for member in members if member.name in found]


# -- from the command line to members


def axes_of(sets: Sequence[str], variants: Sequence[str]) -> list[Axis]:
    """Return the axes of ``--set key=value,value`` and of ``--variant 'name: key=value, key=value'``.

    Raises:
        ConfigError: an option cannot be read, or a key or value occurs twice.
    """
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for text in sets:
        key, separator, values = text.partition("=")
        listed = split(values, option=f"--set {text}")
        if not separator or not key:
            raise ConfigError(
                f"--set {text}: expected key=value,value,…", do="give values, such as --set sparsity.density=0.1,0.2"
            )
        if not all(listed):
            raise ConfigError(
                f"--set {text}: a value is empty",
                do="remove the extra comma, or write \"''\" (quoted for the shell) for an empty string",
            )
        if key in found:
            raise ConfigError(f"--set {text}: {key} has values already", do=f"list all values in one --set {key}=…")
        found[key] = {value: (f"{key}={value}",) for value in listed}
        _require_unlike(listed, option=f"--set {text}")
    named: dict[str, tuple[str, ...]] = {}
    for text in variants:
        name, separator, settings = text.partition(":")
        listed = split(settings, option=f"--variant {text}") if settings.strip() else []
        if not separator or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name) or not all("=" in s for s in listed):
            raise ConfigError(
                f"--variant {text}: expected 'name: key=value, key=value'",
                do="write a name (letters, digits, _ . + -), a colon and the settings; with nothing after the colon, "
                "the configuration is used unchanged",
            )
        if name in named:
            raise ConfigError(f"--variant {text}: there is a variant {name} already", do="choose another name")
        named[name] = tuple(listed)
    _require_unlike(list(named), option="--variant")
    last = [key.rpartition(".")[2] for key in found]
    axes = [Axis(VARIANT, named)] if named else []
    axes += [
        Axis(short if last.count(short) == 1 and short not in (VARIANT, "seed") else key, values)
        for short, (key, values) in zip(last, found.items(), strict=True)
    ]
    for setting in itertools.chain.from_iterable(s for axis in axes for s in axis.values.values()):
        require_free(setting)
    return axes


def require_free(setting: str) -> None:
    """Check that ``key=value`` does not set what the sweep sets itself. Raises ConfigError."""
    key = setting.partition("=")[0].strip()
    if key in SET_BY_SWEEP:
        raise ConfigError(f"{setting}: a sweep sets {key} itself", do=f"use {SET_BY_SWEEP[key]}")


def split(text: str, *, option: str) -> list[str]:
    """Split at the commas outside brackets and quotes: ``[1,2],[3]`` becomes ``[1,2]`` and ``[3]``.

    Raises:
        ConfigError: a bracket or quote is not closed; ``option`` names the text.
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if character == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += character
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES and not parts[-1].strip(character).strip():
            quote = character  # a quote inside a word is an apostrophe
        else:
            depth += (character in _OPENING) - (character in _CLOSING)
    if depth or quote:
        raise ConfigError(f"{option}: a bracket or quote is not closed", do="close it")
    return [part.strip() for part in parts]


def _require_unlike(values: Sequence[str], *, option: str) -> None:
    """Check that no two values share the name of a folder."""
    names = [combination_of({"": value}) for value in values]
    for one, other in itertools.combinations(range(len(values)), 2):
        if values[one] == values[other]:
            raise ConfigError(f"{option}: {values[one]} is listed twice", do="list every value once")
        if names[one] == names[other]:
            raise ConfigError(
                f"{option}: {values[one]} and {values[other]} would share the folder {names[one][1:]!r}",
                do="give them names with --variant 'name: key=value'",
            )


def members_of(
    axes: Sequence[Axis],
    seeds: Sequence[int],
    *,
    settings: Sequence[str],
    folder: Path,
    load: Callable[[Sequence[str]], Config],
) -> list[Member]:
    """Return the product of all axes and seeds, in the order of the command line, seeds innermost.

    Args:
        axes: what varies; none: only the seed.
        seeds: the seeds.
        settings: ``key=value`` for all members.
        folder: of the sweep.
        load: returns the checked configuration for some settings.

    Raises:
        ConfigError: a configuration is invalid, or two combinations have the same.
    """
    members: list[Member] = []
    combinations: dict[str, str] = {}  # configuration -> name
    for picked in itertools.product(*(axis.values for axis in axes)):
        values = {axis.name: value for axis, value in zip(axes, picked, strict=True)}
        varied = [setting for axis in axes for setting in axis.values[values[axis.name]]]
        for seed in seeds:
            name = f"{combination_of(values)},seed={seed}".removeprefix(",")
            if len(name) > MAX_NAME:
                raise ConfigError(
                    f"{name[:60]}…: expected a folder name of at most {MAX_NAME} characters, got {len(name)}",
                    do="give long settings a short name with --variant 'name: key=value'",
                )
            own = [*settings, *varied, f"seed={seed}", f"output_dir={_quoted(str(folder / name))}"]
            try:
                config = load(own)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error.what}", do=error.do) from None
            if not config.tracking.run_name:
                own.append(f"tracking.run_name={config.name},{name}")
            members.append(Member(values, seed, config, tuple(own)))
        kept = {
            key: value for key, value in dataclasses.asdict(config).items() if key not in ("output_dir", "tracking")
        }
        computed = json.dumps(kept, sort_keys=True)
        if (same := combinations.setdefault(computed, members[-1].combination)) != members[-1].combination:
            raise ConfigError(f"{same} and {members[-1].combination} are the same configuration", do="leave one out")
    return members


def _quoted(text: str) -> str:
    """Return a text as YAML reads it back."""
    return text if re.fullmatch(r"[\w./=,+-]+", text) else json.dumps(text, ensure_ascii=False)


# -- sweep.json


@dataclass
class Record:
    """The members of a sweep as they were first started, and how each ended; saved after every change."""

    folder: Path
    members: dict[str, dict[str, Any]]  # name -> values, seed, config, exit_code (None: has not ended), seconds
    tracker_run: str = ""  # the run in MLflow whose children the members are

    def save(self) -> None:
        """Write ``sweep.json``. Raises WriteError or PermissionDenied."""
        content = {"members": self.members, "tracker_run": self.tracker_run}
        write_atomically(self.folder / RECORD, (json.dumps(redact_all(content), indent=1) + "\n").encode())

    def is_done(self, name: str) -> bool:
        """Return whether the member has ended with 0 and its report is there.

        Of a member whose end nobody recorded, as in a task of an array, the page of the report has to
        be there, which comes after all that a table reads, and nobody may be at work.
        """
        code, report = self.members[name]["exit_code"], self.folder / name / "report"
        if code is None:
            return (report / "report.html").is_file() and not at_work_in(self.folder / name)
        return code == 0 and (report / "report.json").is_file()

    def ended(self, name: str, exit_code: int | None, seconds: float) -> None:
        """Record how a member ended; None: it was stopped."""
        self.members[name] |= {"exit_code": exit_code, "seconds": round(seconds, 1)}
        self.save()


def load_record(folder: Path) -> Record | None:
    """Read ``sweep.json``; None if there is none.

    Raises:
        IntegrityError: it is damaged.
        PermissionDenied, WriteError: it cannot be read.
    """
    path = folder / RECORD
    try:
        content = parse_json(read_capped(path, MAX_RECORD_BYTES))
        record = Record(folder, content["members"], content["tracker_run"])
        for name, member in record.members.items():
            kinds = [type(member[key]) for key in ("values", "seed", "config", "seconds")]
            if "/" in name or kinds[:3] != [dict, int, dict] or type(member["exit_code"]) not in (int, type(None)):
                raise ValueError(f"member {name!r} is not as expected")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise cannot_read(path, error) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(
            f"{path}: is not the record of a sweep: {why_malformed(error)}",
            do=f"restore it from a copy, or {OTHER_OUTPUT}",
        ) from None
    return record


def opened_record(folder: Path, members: Sequence[Member]) -> Record:
    """Return the record of the sweep in ``folder``, with members that were added since; nothing is written.

    Raises:
        ConfigError: the folder holds another sweep; says what differs.
        WriteError: the folder holds a run.
    """
    record = load_record(folder)
    if record is None:
        if (folder / run_record.NAME).exists():
            raise WriteError(f"{folder}: holds a run, not a sweep", do=OTHER_OUTPUT)
        record = Record(folder, {})
    elif changes := _changes(record, members):
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ConfigError(
            f"{folder}: holds another sweep: {'; '.join(changes[:3])}{more}",
            do=f"restore what was changed, or {OTHER_OUTPUT}; only values, variants and seeds may be added",
        )
    for member in members:
        stored = record.members.get(member.name, {"exit_code": None, "seconds": 0.0})
        own = {"values": dict(member.values), "seed": member.seed, "config": dataclasses.asdict(member.config)}
        record.members[member.name] = own | {key: stored[key] for key in ("exit_code", "seconds")}
    record.members = {member.name: record.members[member.name] for member in members}  # in the order of today
    return record


def _changes(record: Record, members: Sequence[Member]) -> list[str]:
    """Return what differs between the stored sweep and today's, other than added members."""
    before, after = [list(m["values"]) for m in record.members.values()], [list(m.values) for m in members]
    if before and after and before[0] != after[0]:
        return [f"it varies {', '.join(before[0]) or 'only the seed'}, not {', '.join(after[0]) or 'only the seed'}"]
    today = {member.name: member for member in members}
    present = {(name, value) for member in members for name, value in [*member.values.items(), ("seed", member.seed)]}
    gone = [
        f"{name}={value} was left out"
        for member in record.members.values()
        for name, value in [*member["values"].items(), ("seed", member["seed"])]
        if (name, value) not in present
    ]
    changed = [
        f"{name}: {change}"
        for name, member in record.members.items()
        if name in today
        for change in differences(member["config"], dataclasses.asdict(today[name].config))
    ]
    return list(dict.fromkeys(gone + changed))
