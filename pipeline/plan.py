"""Plan the phases of a run from its configuration. Epochs and samples are converted to steps only here.

**The scaling rule.** A recipe is written for ``plan.reference_batch`` samples per step. With
another ``train.global_batch``, every learning rate is multiplied by ``global_batch /
reference_batch``, and every length given in steps (ΔT, warm-up, phases) keeps its number of
*samples*: ``4000 steps`` at reference batch 128 are 500 steps at global batch 1024. Lengths in
epochs do not depend on the batch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline import schedules
from pipeline.config.schema import Config, LrConfig, PhaseConfig, PlanConfig, SparsityConfig, named_as_keys, strategy_of
from pipeline.config.timetables import TIMETABLES, PhaseOutline
from pipeline.errors import ConfigError
from pipeline.numbers import quantity
from pipeline.schedules import Schedule, length_in_steps
from pipeline.sparse.strategy import Strategy
from pipeline.sparse.timing import DueUpdate, UpdateSchedule, build_update_schedule

EXPLORATION = "exploration"  # name of the phase in every timetable that has it
FEW_UPDATES = 20  # warn about fewer
LONG_EPOCHS = 10  # warn about a learning rate that does not fall in a phase of at least this length with a ticket
MAX_STEPS = 100_000_000  # 100 epochs of ImageNet at batch 128 are 1 million; anything longer is a mistake
MAX_UPDATES = 100_000  # per phase; the papers have hundreds
SHOWN_RATES = 10_000  # steps of a phase at which the learning rate is sampled


@dataclass(frozen=True)
class Phase:
    """One row of the plan: steps ``start`` … ``stop`` − 1 of the run."""

    name: str
    start: int
    stop: int
    lr_schedule: Schedule  # takes the step within the phase
    update_schedule: UpdateSchedule  # topology updates, by step within the phase
    ticket_index: int | None  # of the ticket that ends the phase; None: no ticket

    def lr(self, step: int) -> float:
        """Return the learning rate of run step ``step``."""
        return self.lr_schedule(step - self.start)

    def update_at(self, step: int) -> DueUpdate | None:
        """Return the topology update that follows run step ``step``, or None if none is due."""
        return self.update_schedule.at(step - self.start)

    def closes_with_ticket(self, step: int) -> bool:
        """Return whether ``step`` is the last of a phase that ends with a ticket."""
        return self.ticket_index is not None and step == self.stop - 1

    def update_steps(self) -> list[int]:
        """Return the run steps that are followed by a topology update."""
        return [self.start + step for step in self.update_schedule.steps()]


@dataclass(frozen=True)
class Plan:
    """The phases of a run, in steps."""

    phases: tuple[Phase, ...]
    steps_per_epoch: int
    global_batch: int
    reference_steps: int  # length of the dense run with which training FLOPs are compared

    @property
    def num_steps(self) -> int:
        """Number of optimiser steps of the whole run."""
        return self.phases[-1].stop

    def at(self, step: int) -> Phase:
        """Return the phase of run step ``step``."""
        return next(phase for phase in self.phases if step < phase.stop)


class _Planner:
    """Converts the lengths and learning rates of a configuration to steps and scaled rates."""

    def __init__(self, config: Config, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.global_batch = config.train.global_batch
        self.reference_batch = config.plan.reference_batch
        self.strategy = strategy_of(config.sparsity)
        self.final_density = config.sparsity.density

    def steps(self, length: str) -> int:
        return length_in_steps(
            length,
            steps_per_epoch=self.steps_per_epoch,
            global_batch=self.global_batch,
            reference_batch=self.reference_batch,
        )

    def in_words(self, length: str) -> str:
        """Return a length as the configuration gives it, and in steps of this batch."""
        given, steps = repr(length), quantity(self.steps(length), "step")
        if "step" in length and self.reference_batch != self.global_batch:
            given += f" of {self.reference_batch} samples (plan.reference_batch)"
            steps += f" of {self.global_batch} samples (train.global_batch)"
        return f"{given}, which is {steps}"

    def lr(self, config: LrConfig, length: int) -> Schedule:
        scale = self.global_batch / self.reference_batch
        high, low = config.value * scale, config.low * scale
        schedule = {
            "constant": lambda: schedules.constant(high),
            "step": lambda: schedules.step_decay(high, [self.steps(m) for m in config.milestones], config.factor),
            "cosine": lambda: schedules.cosine(high, low, length),
            "triangular": lambda: schedules.triangular(low, high, length),
        }[config.schedule]()
        warmup = self.steps(config.warmup)
        return schedules.warmup(schedule, warmup / self.steps_per_epoch, self.steps_per_epoch) if warmup else schedule

    def phases(self, outlines: Iterable[PhaseOutline], config: PlanConfig) -> list[Phase]:
        """Return the phases of a timetable, one after the other; their tickets are counted from 0.

        A refinement phase opens with a large update, to move away from the ticket of the phase
        before. If that phase had no ticket, there is no such update: in the CIFAR timetable of EDST
        the first refinement has none, in the ImageNet one every refinement has one.
        """
        phases: list[Phase] = []
        num_tickets = 0
        for name, section in outlines:
            settings: PhaseConfig = getattr(config, section)
            follows_ticket = bool(phases) and phases[-1].ticket_index is not None
            phases.append(
                self.phase(
                    settings,
                    self.strategy_in(section, settings),
                    name=name,
                    start=phases[-1].stop if phases else 0,
                    ticket_index=num_tickets if settings.ticket else None,
                    opening_drop=settings.opening_drop if follows_ticket else None,
                )
            )
            num_tickets += settings.ticket
        return phases

    def strategy_in(self, section: str, config: PhaseConfig) -> Strategy:
        """Return the method with the settings of a phase.

        Refinement has the final density, and no updates unless the phase itself sets an interval.
        """
        if section == "exploration":
            return self.changed(config, update_interval=config.update_interval or self.strategy.update_interval)
        return self.changed(config, update_interval=config.update_interval, initial_density=None)

    def changed(self, config: PhaseConfig, **changes: Any) -> Strategy:
        """Return the method with the drop settings of the phase and ``changes``."""
        given = {key: getattr(config, key) for key in ("drop_fraction", "drop_end", "drop_schedule")}
        return dataclasses.replace(
            self.strategy, **changes, **{key: value for key, value in given.items() if value is not None}
        )

    def phase(
        self,
        config: PhaseConfig,
        strategy: Strategy,
        *,
        name: str,
        start: int,
        ticket_index: int | None,
        opening_drop: float | None = None,
    ) -> Phase:
        length, section = self.steps(config.length), f"plan.{name.partition('-')[0]}"
        if length > MAX_STEPS:
            raise ConfigError(
                f"{section}.length: expected at most {MAX_STEPS:,} steps, got {self.in_words(config.length)}",
                do="shorten it",
            )
        interval = (
            self.steps(strategy.update_interval) if strategy.update_interval and strategy.changes_masks else length
        )
        if length // interval > MAX_UPDATES:
            raise ConfigError(
                f"{section}.update_interval: expected at most {MAX_UPDATES:,} topology updates in {config.length!r}, "
                f"got one every {strategy.update_interval!r}, which is {length // interval:,} updates",
                do="raise it, or shorten the phase",
            )
        with named_as_keys("sparsity", SparsityConfig):
            update_schedule = build_update_schedule(
                strategy, length, in_steps=self.steps, density=self.final_density, opening_drop=opening_drop
            )
        return Phase(
            name=name,
            start=start,
            stop=start + length,
            lr_schedule=self.lr(config.lr, length),
            update_schedule=update_schedule,
            ticket_index=ticket_index,
        )


def steps_per_epoch_of(config: Config, num_samples: int) -> int:
    """Return the number of whole global batches in ``num_samples`` training samples.

    Raises:
        ConfigError: there are fewer samples than one global batch.
    """
    batch = config.train.global_batch
    if num_samples < batch:
        raise ConfigError(
            f"train.global_batch: {batch} is larger than the training set ({num_samples} samples)",
            do="choose a smaller batch",
        )
    return num_samples // batch


def build_plan(config: Config, *, steps_per_epoch: int) -> Plan:
    """Build the plan of ``config``.

    Raises:
        ConfigError: a length is invalid, or the run has too many steps.
    """
    planner = _Planner(config, steps_per_epoch)
    outlines = TIMETABLES[config.plan.timetable].phases(config.plan.num_refinements)
    phases = planner.phases(outlines, config.plan)
    if phases[-1].stop > MAX_STEPS:
        sections = Counter(section for _, section in outlines)
        given = (
            f"{num} × {getattr(config.plan, name).length!r} (plan.{name}.length)" for name, num in sections.items()
        )
        raise ConfigError(
            f"plan: expected at most {MAX_STEPS:,} steps in all phases, got {' and '.join(given)}, which is "
            f"{phases[-1].stop:,} steps",
            do="shorten the phases",
        )
    reference = planner.steps(config.plan.dense_reference) if config.plan.dense_reference else phases[-1].stop
    return Plan(tuple(phases), steps_per_epoch, config.train.global_batch, reference)


def dry_run_plan(plan: Plan, *, global_batch: int) -> Plan:
    """Shorten every phase to two steps of ``global_batch`` samples, with one topology update if the phase has any."""
    phases = []
    for index, phase in enumerate(plan.phases):
        schedule = phase.update_schedule
        has_updates = schedule.update_interval is not None and schedule.opening_drop is None
        density = schedule.density_schedule
        final = density(schedule.density_until) if density is not None else 0.0
        shrunk = Phase(
            name=phase.name,
            start=2 * index,
            stop=2 * index + 2,
            lr_schedule=schedules.constant(phase.lr(phase.start)),
            update_schedule=UpdateSchedule(
                num_steps=2,
                update_interval=1 if has_updates else None,
                drop_schedule=schedules.constant(schedule.drop_schedule(1)),
                opening_drop=schedule.opening_drop,
                density_schedule=None if density is None else schedules.cubic(density(0), final, 0, 1),
                density_until=1,
            ),
            ticket_index=phase.ticket_index,
        )
        phases.append(shrunk)
    return Plan(tuple(phases), plan.steps_per_epoch, global_batch, phases[-1].stop)


def check_plan(plan: Plan, config: Config) -> None:
    """Check that the plan has the topology updates that its timetable is for.

    Raises:
        ConfigError: the run has no update, or the refinement phases have none, so that the masks of
            all tickets would be equal.
    """
    if not strategy_of(config.sparsity).changes_masks:
        return
    planner = _Planner(config, plan.steps_per_epoch)
    for before, phase in itertools.pairwise(plan.phases[:3]):  # later phases equal the third
        if before.ticket_index is not None and not phase.update_steps():
            section = phase.name.partition("-")[0]
            length = planner.in_words(getattr(config.plan, section).length)
            raise ConfigError(
                f"plan.{section}: there is no topology update in a phase of {length}, so all tickets would have the "
                "same mask",
                do="set plan.refinement.opening_drop (0.5 for Sup-tickets, 0.8 for EDST), set a lower "
                "plan.refinement.update_interval, or raise plan.refinement.length",
            )
    if not any(phase.update_steps() for phase in plan.phases):
        given = config.plan.exploration.update_interval
        interval = given or strategy_of(config.sparsity).update_interval
        whose = "plan.exploration.update_interval" if given else "the method's update interval"
        shown = planner.in_words(interval) if interval else "null"
        most = max(1, plan.phases[0].stop - 1) * plan.global_batch
        raise ConfigError(
            f"plan: sparsity.method {config.sparsity.method!r} changes masks, but there is no topology update "
            f"in the run's {quantity(plan.num_steps, 'step')} ({whose} is {shown}; there is no update in the last step "
            "of a phase or where the drop fraction is 0)",
            do=f"set plan.exploration.update_interval to at most '{most} samples', or train with "
            "sparsity.method=static plan.timetable=static",
        )


def plan_warnings(plan: Plan) -> Iterator[str]:
    """Yield a line for everything that is valid but probably a mistake.

    Warns about few updates, an update just before a ticket, and a learning rate that does not fall.
    """
    for phase in plan.phases:
        interval, updates = phase.update_schedule.update_interval, phase.update_steps()
        since = phase.stop - 1 - updates[-1] if updates else 0
        if phase.ticket_index is not None and interval and updates and since < interval / 2:
            last = phase.update_at(updates[-1])
            share = last.drop_fraction if last else 0.0
            yield (
                f"{phase.name}: ticket-{phase.ticket_index} comes {quantity(since, 'step')} after an update, so up to "
                f"{share:.1%} of its weights are hardly trained: change length or update_interval"
            )
        replaces = phase.update_schedule.drop_schedule(1) > 0
        if phase.name == "exploration" and interval and replaces and len(updates) < FEW_UPDATES:
            num = f"only {quantity(len(updates), 'update')}" if updates else "no update"
            yield f"exploration has {num}; the papers have hundreds: lower plan.exploration.update_interval"
    for phase in plan.phases[:2]:  # all refinement phases have the same schedule
        rates, epochs = _rates(phase), (phase.stop - phase.start) / plan.steps_per_epoch
        if phase.ticket_index is not None and epochs >= LONG_EPOCHS and rates[-1] == max(rates):
            yield (
                f"{phase.name} ends at its highest learning rate ({rates[-1]:.4g}); better: "
                f"plan.{phase.name.partition('-')[0]}.lr.schedule=cosine"
            )


def _rates(phase: Phase) -> list[float]:
    """Return learning rates of steps spread over the phase, and of its last step."""
    every = 1 + (phase.stop - phase.start) // SHOWN_RATES
    return [phase.lr(step) for step in (*range(phase.start, phase.stop, every), phase.stop - 1)]


def describe_plan(plan: Plan, *, is_brief: bool = False) -> str:
    """Format the plan as a table with one line per phase; in brief, phases that are alike share one."""
    epochs = plan.num_steps / plan.steps_per_epoch
    title = (
        f"{plan.num_steps} steps, {epochs:g} epochs of {plan.steps_per_epoch} steps, "
        f"{plan.global_batch} samples per step"
    )
    cells = [["phase", "steps", "epochs", "learning rate", "ΔT", "updates", "ticket"]]
    groups = itertools.groupby(plan.phases, _about if is_brief else lambda phase: phase.name)
    for phases in ([*group] for _, group in groups):
        first, last = phases[0], phases[-1]
        (_, rates, interval, num_updates, remarks) = _about(first)
        has_ticket = first.ticket_index is not None
        ticket = _span(f"ticket-{first.ticket_index}", f"ticket-{last.ticket_index}") if has_ticket else "–"
        cells.append(
            [
                _span(first.name, last.name),
                f"{first.start}–{last.stop - 1}",
                f"{first.start / plan.steps_per_epoch:g}–{last.stop / plan.steps_per_epoch:g}",
                rates,
                interval,
                f"{len(phases)}×{num_updates}" if len(phases) > 1 else str(num_updates),
                ", ".join([ticket, *remarks]),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            f"{cell:{'<' if column in (0, 3, 6) else '>'}{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([title, *lines])


def _about(phase: Phase) -> tuple[int, str, str, int, tuple[str, ...]]:
    """Return what a plan says of a phase apart from where it stands: length, rates, ΔT, updates, remarks."""
    rates, schedule, updates = _rates(phase), phase.update_schedule, phase.update_steps()
    remarks = []
    if updates and phase.ticket_index is not None:
        remarks += [f"{quantity(phase.stop - 1 - updates[-1], 'step')} after last update"]
    if schedule.opening_drop is not None:
        remarks += [f"opens with {schedule.opening_drop:g}"]
    if schedule.density_schedule is not None:
        density, until = schedule.density_schedule, schedule.density_until
        remarks += [f"density {density(0):g} → {density(until):g} at step {until}"]
    shown = f"{rates[0]:.3g} … {max(rates):.3g} … {rates[-1]:.3g}"
    return phase.stop - phase.start, shown, str(schedule.update_interval or "–"), len(updates), tuple(remarks)


def _span(first: str, last: str) -> str:
    """Return ``ticket-1…3`` for ``ticket-1`` and ``ticket-3``."""
    return first if first == last else f"{first}…{last.rpartition('-')[2]}"
