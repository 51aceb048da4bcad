"""Check a configuration for values, and combinations of values, that have the right type and are invalid."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline import parts
from pipeline.config.keys import LENGTH_UNIT, Key
from pipeline.config.registries import REGISTRIES, choices_of
from pipeline.config.schema import (
    DEEPSPEED_KEYS,
    KEYS,
    NAME,
    NAME_RULE,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    PlanConfig,
    SparsityConfig,
    TrainConfig,
    strategy_of,
)
from pipeline.config.timetables import TIMETABLES, Timetable
from pipeline.config.yaml_nodes import of_entry
from pipeline.models.names import MODELS, PAPER_ARGS, PAPER_MODELS, TIMM
from pipeline.redaction import SECRET_KEY
from pipeline.schedules import LENGTH
from pipeline.sparse.strategy import METHODS, Strategy, contradictions
from pipeline.superposition.rules import RULES

URI = re.compile(r"sqlite:///.+|(?!sqlite)[a-z][a-z0-9+.-]*://.+|file:.+|databricks")  # the forms that MLflow accepts
OWN_KEYS = {  # DeepSpeed's key -> the key of this configuration that it is derived from
    "bf16": "train.precision",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "train.optimizer",
    "scheduler": "plan.exploration.lr",
    "train_batch_size": "train.global_batch",
    "zero_optimization": "train.zero_stage",
}
SET_HELD_OUT = "set evaluation.held_out to a .beton file of such images (python -m data_prep … --hold-out N writes one)"
HOST_AND_PORT = re.compile(r"[a-z0-9][a-z0-9.-]*:\d{1,5}/?", re.IGNORECASE)
MAX_LENGTH = 1e12  # steps, samples or epochs; anything longer is a mistake


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every value in nested dictionaries."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def impossible(config: Config) -> Iterator[str]:
    """Yield one line for every value, or combination of values, that is invalid."""
    values = dict(leaves(dataclasses.asdict(config)))
    is_open = bool(parts.imported())  # a table may have rows that the schema does not list
    for name, key in KEYS.items():
        value = values.get(name)
        if value is not None and not value == "" == key.default:  # an empty default means "not set"
            yield from _invalid(key, value, choices_of(name) if is_open and name in REGISTRIES else key.choices)
    if not NAME.fullmatch(config.name):
        yield f"name: expected {NAME_RULE}, got {config.name!r}"
    yield from _bad_model(config.model, is_open=is_open)
    yield from bad_address(config.tracking.uri)
    yield from _contradictions(config)


def unworkable(config: Config) -> Iterator[str]:
    """Yield one line for every valid value with which a training run would not work.

    An evaluation is not checked for these: it reads the configuration that a ticket was trained
    with, whatever that was.
    """
    yield from _bad_scale(config.data)
    yield from _bad_model_args(config.model)


def _bad_scale(data: DataConfig) -> Iterator[str]:
    """Find a mean or standard deviation for pixels between 0 and 1, as in torchvision.

    On that scale no standard deviation exceeds 0.5; on the 0–255 scale only black images have a mean
    below 1. A mean of 0 and a standard deviation of 1 are valid: they leave pixels unchanged.
    """
    for key, values, is_small in (
        ("data.mean", data.mean, 0 < max(data.mean) <= 1),
        ("data.std", data.std, max(data.std) < 1),
    ):
        if is_small:
            scaled = ", ".join(f"{255 * value:g}" for value in values)
            yield f"{key}: expected numbers on the 0–255 scale, got {values} on the 0–1 scale; write [{scaled}]"


def _bad_model_args(model: ModelConfig) -> Iterator[str]:
    """Find arguments that one of the project's own networks does not take.

    The networks of torchvision and timm check their arguments when they are built.
    """
    if model.name not in PAPER_MODELS:
        return
    known = PAPER_ARGS.get(model.name, ())
    for key, value in model.args.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.7)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known) or 'none'}"
            yield f"model.args.{key}: is not an argument of {model.name}; {hint}"
        elif type(value) is not int or value < 1:
            yield f"model.args.{key}: expected a whole number of at least 1, got {value!r}"


def _invalid(key: Key, value: Any, choices: Sequence[str]) -> Iterator[str]:
    """Check a value against the declaration of its key, and against ``choices`` if there are any."""
    if key.unit == LENGTH_UNIT:
        is_list = isinstance(value, list)
        for length in value if is_list else [value]:
            if length not in key.words:
                yield from _bad_length(key, length, is_entry=is_list)
    elif choices and value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        yield f"{key.name}: {value!r} is not one of {', '.join(choices)}" + (
            f"; did you mean {close[0]!r}?" if close else ""
        )
    elif key.bounds and not key.allows(value):
        kind = "a whole number" if isinstance(value, int) else "a number"
        yield f"{key.name}: expected {kind} {key.bounds}, got {value}"


def _bad_length(key: Key, value: str, *, is_entry: bool) -> Iterator[str]:
    match, expected = LENGTH.fullmatch(str(value)), f"{key.name}: expected {of_entry(is_entry)}"
    if not match:
        words = "".join(f"{word!r}, or " for word in key.words)
        yield (
            f"{expected}{words}a number and a unit, such as '4000 steps', '512000 samples' or '90 epochs', "
            f"got {value!r}"
        )
    elif float(match[1]) == 0 and key.at_least != 0:
        yield f"{expected}more than 0, got {value!r}"
    elif float(match[1]) > MAX_LENGTH:
        yield f"{expected}at most {MAX_LENGTH:,.0f} {match[2]}, got {value!r}"


def _contradictions(config: Config) -> Iterator[str]:
    plan, sparsity, train = config.plan, config.sparsity, config.train
    if train.accumulation > 0 and train.global_batch % train.accumulation:
        yield (
            f"train.accumulation: expected a divisor of train.global_batch ({train.global_batch}), got "
            f"{train.accumulation}; change one of the two"
        )
    if train.device == "cpu" and train.backend == "nccl":
        yield "train.backend: 'nccl' needs GPUs, but train.device is 'cpu'; use auto"
    yield from _bad_optimizer(train)
    yield from _bad_superposition(config.evaluation)
    yield from _bad_tickets(config)
    if sparsity.method in METHODS:
        yield from _bad_sparsity(config, strategy_of(sparsity))
    for key in set(train.deepspeed) - set(DEEPSPEED_KEYS):
        if key in OWN_KEYS:
            yield f"train.deepspeed.{key}: cannot be set; remove it, and set {OWN_KEYS[key]} instead"
        else:
            yield (
                f"train.deepspeed.{key}: cannot be set; remove it, or choose one of {', '.join(DEEPSPEED_KEYS)} (all "
                "other DeepSpeed settings are derived from this configuration)"
            )
    if (sparsity.method == "dense") != (sparsity.density == 1):
        yield (
            f"sparsity.density: {sparsity.density:g} is invalid with sparsity.method {sparsity.method!r}; the density "
            "is 1 if and only if the method is 'dense'"
        )
    yield from _bad_timetable(plan, sparsity)
    if config.tickets.copy_to and "://" not in config.tickets.copy_to:
        yield f"tickets.copy_to: {config.tickets.copy_to!r} is not a URL such as s3://bucket/run/tickets"
    yield from _bad_data(config.data)
    for key, values in (("data.mean", config.data.mean), ("data.std", config.data.std)):
        if len(values) != 3 or (key == "data.std" and min(values, default=0) <= 0):
            expected = "three positive numbers" if key == "data.std" else "three numbers"
            yield f"{key}: expected {expected}, one per colour channel, got {values}"


def _bad_timetable(plan: PlanConfig, sparsity: SparsityConfig) -> Iterator[str]:
    if plan.exploration.opening_drop is not None:
        yield "plan.exploration.opening_drop: must be null; only refinement phases can start with an opening update"
    if plan.refinement is not None and not plan.refinement.ticket:
        yield "plan.refinement.ticket: must be true; every refinement phase ends with a ticket"
    timetable = TIMETABLES.get(plan.timetable)
    if timetable is None:
        return
    if sparsity.method in METHODS:
        yield from _bad_method(plan, sparsity.method, timetable)
    if timetable.has_refinements:
        needed = f"but plan.timetable {plan.timetable!r} needs"
        if plan.refinement is None:
            yield (
                f"plan.refinement: is null, {needed} refinement phases; set plan.refinement.length, or choose another "
                "timetable"
            )
        if plan.num_refinements < 1:
            yield (
                f"plan.num_refinements: is {plan.num_refinements}, {needed} at least 1; set it, or choose another "
                "timetable"
            )
    if not timetable.has_refinements and not plan.exploration.ticket:
        yield f"plan.exploration.ticket: must be true; the phase of timetable {plan.timetable!r} ends with a ticket"
    if timetable.needs_first_ticket and not plan.exploration.ticket:
        yield "plan.exploration.ticket: must be true; Sup-tickets start superposition from the ticket of exploration"


def _bad_method(plan: PlanConfig, name: str, timetable: Timetable) -> Iterator[str]:
    row, needs = METHODS[name], f"plan.timetable: {plan.timetable!r} needs"
    if timetable.methods == "dense" and name != "dense":
        yield f"{needs} sparsity.method 'dense', got {name!r}"
    if timetable.methods == "fixed" and (row.changes_masks or name == "dense"):
        yield f"{needs} sparsity.method 'static', or another whose masks never change, got {name!r}"
    if timetable.methods == "changing" and not row.changes_masks:
        yield f"{needs} a method that changes masks, but sparsity.method {name!r} does not"
    elif timetable.has_refinements and row.grow is None:
        yield f"{needs} a method that grows weights, but sparsity.method {name!r} only prunes"


def _bad_data(data: DataConfig) -> Iterator[str]:
    if data.first_resolution:
        if data.first_resolution > data.train_resolution:
            yield (
                f"data.first_resolution: {data.first_resolution} is larger than data.train_resolution "
                f"{data.train_resolution}"
            )
        if data.ramp_until <= data.ramp_from:
            yield (f"data.ramp_until: expected more than data.ramp_from ({data.ramp_from}), got {data.ramp_until}")
        if data.augmentation == "pad_crop_flip":
            yield "data.first_resolution: must be 0 with data.augmentation 'pad_crop_flip', which does not resize"
    elif data.ramp_until:
        yield "data.ramp_until: needs data.first_resolution, the resolution to start from"
    if data.loader == "folder" and data.order != "random":
        yield f"data.order: {data.order!r} needs .beton files; with data.loader 'folder' the order must be 'random'"
    if data.loader == "folder" and data.stage:
        yield "data.stage: needs .beton files; data.loader 'folder' reads images from where they are"


def _bad_model(model: ModelConfig, *, is_open: bool) -> Iterator[str]:
    module, is_dotted, _ = model.name.partition(":")
    if model.name.startswith(TIMM) or model.name in MODELS or (is_open and model.name in choices_of("model.name")):
        pass
    elif is_dotted:
        if not parts.is_named(module):
            yield f"model.name: {model.name!r} is code of a package; add {module.partition('.')[0]!r} to imports"
    else:
        close = difflib.get_close_matches(model.name, MODELS, n=3) or PAPER_MODELS
        yield (
            f"model.name: {model.name!r} is not a model of pipeline.models, torchvision or timm; choose a name "
            f"such as {', '.join(close)} or timm/NAME"
        )
    if model.num_classes == 1:
        yield "model.num_classes: expected 0 (taken from the data set) or at least 2, got 1"
    if model.from_ticket and model.from_state:
        yield "model.from_state: cannot be set together with model.from_ticket; remove one of them"
    if model.new_head and not (model.from_ticket or model.from_state):
        yield "model.new_head: needs model.from_ticket or model.from_state; remove it"
    for key, value in leaves(model.args):
        if isinstance(value, str) and SECRET_KEY.search(key):
            yield f"model.args: {key!r} looks like a secret, which would appear in every record of the run; remove it"
        if isinstance(value, float) and not math.isfinite(value):
            yield f"model.args.{key}: {value} is not a finite number"


def bad_address(uri: str, *, setting: str = "tracking.uri") -> Iterator[str]:
    """Check the address of a tracking server or store, which ``setting`` holds.

    MLflow takes any other text for the path of a file store. It takes a password with / or # in it
    for host and port, and would print it in its errors.
    """
    if uri and not URI.fullmatch(uri):
        got = "" if "@" in uri else f", got {uri!r}"  # there may be a password before the @
        if HOST_AND_PORT.fullmatch(uri):
            yield f"{setting}: expected a URI{got}; did you mean 'http://{uri}'?"
            return
        has_scheme = re.match("[a-z][a-z0-9+.-]*:/", uri, re.IGNORECASE)
        problem = f"expected a URI{got}" if got or has_scheme else "has no scheme"
        yield (
            f"{setting}: {problem}; write http://HOST:PORT (or http://USER:PASSWORD@HOST:PORT) for a server, or "
            "sqlite:////path/mlflow.db for a file"
        )
        return
    if re.match("https?://(:[0-9]*)?(/|$)", uri):
        yield f"{setting}: has no host name; expected http://HOST:PORT or http://USER:PASSWORD@HOST:PORT"
        return
    try:
        parts = urllib.parse.urlsplit(uri)
        is_address = not parts.scheme.startswith("http") or bool(parts.hostname and parts.port != 0)
    except ValueError:
        is_address = False
    if not is_address:
        yield (
            f"{setting}: is not a valid URI; expected http://USER:PASSWORD@HOST:PORT, with every character of USER "
            "and PASSWORD other than letters and digits written as %XX"
        )


def _bad_optimizer(train: TrainConfig) -> Iterator[str]:
    if train.zero_stage in (2, 3):
        yield (
            f"train.zero_stage: {train.zero_stage} is not supported, because it partitions the gradients among the "
            "ranks, but choosing which weights to grow needs all gradients on every rank; use 0 or 1"
        )
    elif train.zero_stage not in (0, 1):
        yield f"train.zero_stage: {train.zero_stage} is not one of 0, 1"
    elif train.zero_stage and train.engine != "deepspeed":
        yield f"train.zero_stage: {train.zero_stage} needs train.engine 'deepspeed', got {train.engine!r}"
    if train.zero_stage == 1 and train.optimizer == "muon":
        yield (
            "train.zero_stage: stage 1 splits the optimizer's state and its copy of the weights among the ranks, in "
            "flat pieces, but train.optimizer 'muon' needs whole matrices; use 0"
        )
    if train.nesterov and (train.optimizer != "sgd" or not train.momentum):
        yield (
            f"train.nesterov: true needs train.optimizer 'sgd' with momentum above 0, got {train.optimizer!r} with "
            f"momentum {train.momentum:g}; set train.nesterov=false"
        )
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        yield f"train.betas: expected two numbers, each >= 0 and < 1, got {train.betas}"
    if train.profile and not (len(train.profile) == 2 and 0 <= train.profile[0] < train.profile[1]):
        yield f"train.profile: expected two steps of which the second is larger, such as [20, 30], got {train.profile}"


def _bad_superposition(evaluation: EvaluationConfig) -> Iterator[str]:
    if not evaluation.coefficients or not all(0 < share < 1 for share in evaluation.coefficients):
        yield f"evaluation.coefficients: expected numbers > 0 and < 1, got {evaluation.coefficients}"
    if not all(weight > 0 for weight in evaluation.ticket_weights):
        yield (
            f"evaluation.ticket_weights: expected numbers > 0, got {evaluation.ticket_weights}; to leave out the "
            "ticket of exploration, set evaluation.with_exploration=false"
        )
    rule = RULES.get(evaluation.superposition)
    if rule is not None and evaluation.ticket_weights and not rule.takes_weights:
        yield f"evaluation.ticket_weights: superposition {evaluation.superposition!r} does not use weights; remove them"
    if rule is not None and rule.is_judged and not evaluation.held_out:
        yield (
            f"evaluation.superposition: {evaluation.superposition!r} chooses by accuracy on held-out images; "
            + SET_HELD_OUT
        )


def _bad_tickets(config: Config) -> Iterator[str]:
    tickets, evaluation = config.tickets, config.evaluation
    if tickets.weights == "average" and not config.train.ema_decay:
        yield (
            "tickets.weights: 'average' needs a moving average of weights; set train.ema_decay, for example to 0.999"
        )
    if tickets.select in ("best", "both"):
        if not evaluation.held_out:
            yield f"tickets.select: {tickets.select!r} chooses by accuracy on held-out images; " + SET_HELD_OUT
        if evaluation.every == "never":
            yield (
                f"tickets.select: {tickets.select!r} needs evaluations during training; "
                "set evaluation.every, for example to 1 epoch"
            )


def _bad_sparsity(config: Config, strategy: Strategy) -> Iterator[str]:
    sparsity, train = config.sparsity, config.train
    if sparsity.own_step_counts and (train.optimizer != "adamw" or train.zero_stage):
        yield "sparsity.own_step_counts: needs train.optimizer 'adamw' and train.zero_stage 0"
    if sparsity.own_step_warmup and not sparsity.own_step_counts:
        yield "sparsity.own_step_warmup: needs sparsity.own_step_counts true"
    row = METHODS[sparsity.method]
    if strategy.initial_density is not None and not row.changes_masks:
        yield f"sparsity.initial_density: the density of method {sparsity.method!r} does not change"
    if strategy.initial != "random" and config.model.from_ticket:
        yield (
            f"sparsity.initial: {strategy.initial!r} chooses masks, but model.from_ticket brings its own; set "
            "sparsity.method=static, or start from its weights with model.from_state"
        )
    if strategy.initial != "random" and sparsity.method == "dense":
        yield f"sparsity.initial: {strategy.initial!r} chooses masks, but method 'dense' has none"
    problems = list(contradictions(strategy, sparsity.density))
    yield from (f"sparsity.{problem}" for problem in problems)
    if any(problem.startswith("structure: ") for problem in problems):
        return
    timetable = TIMETABLES.get(config.plan.timetable)
    if strategy.structure != "none" and timetable is not None and timetable.has_refinements:
        yield (
            "sparsity.structure: superposition prunes single weights and would break the pattern "
            f"{strategy.structure!r}; use plan.timetable 'itop'"
        )
