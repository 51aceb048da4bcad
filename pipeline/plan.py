"""Configuration -> phases. The only place where epochs and samples become steps.

**The scaling rule.** A recipe is written for ``plan.reference_batch`` samples per step. With
another ``train.global_batch``, every learning rate is multiplied by ``global_batch /
reference_batch``, and every length given in steps (ΔT, warm-up, phases) keeps its number of
*samples*: ``4000 steps`` at reference batch 128 are 500 steps at global batch 1024. Epochs are epochs at any batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from pipeline import schedules
from pipeline.config.schema import LENGTH, Config, LrConfig, PhaseConfig, strategy_of
from pipeline.errors import ConfigError
from pipeline.schedules import Schedule

FEW_UPDATES = 20
MAX_STEPS = 100_000_000  # 100 epochs of ImageNet are 1 million at batch 128: what is beyond is a slip
MAX_UPDATES = 100_000  # of a phase; the papers have hundreds
SHOWN_RATES = 10_000  # steps of a phase whose learning rate is looked at to describe it


@dataclass(frozen=True)
class Phase:
    """One row of the plan: steps ``start`` … ``stop`` − 1 of the run."""

    name: str
    start: int
    stop: int
    lr_schedule: Schedule  # of the step within the phase
    drop_schedule: Schedule  # of the steps completed within the phase
    update_interval: int | None
    opening_drop: float | None
    ticket_index: int | None
    density_schedule: Schedule | None = None  # of the steps completed within the phase; None: the density stays
    density_until: int = 0  # steps completed within the phase when the density is final

    def lr(self, step: int) -> float:
        """Learning rate of run step ``step``."""
        return self.lr_schedule(step - self.start)

    def drop_fraction(self, step: int) -> float | None:
        """Drop fraction of the topology update that follows run step ``step``, or None when none is due.

        Updates follow every ``update_interval`` completed steps of the phase, never its closing
        step; the opening update follows its first step (growth needs a gradient).
        """
        completed = step - self.start + 1
        if step == self.stop - 1:
            return None
        if self.opening_drop is not None and completed == 1:
            return self.opening_drop
        if self.update_interval is None or completed % self.update_interval:
            return None
        return self.drop_schedule(completed) or (None if self.density(step) is None else 0.0)

    def density(self, step: int) -> float | None:
        """Density after the topology update that follows run step ``step``; None when there is none, or it leaves the density as it is.

        The first update at or after the end of the schedule lands on the final density.
        """
        completed = step - self.start + 1
        if (
            self.density_schedule is None
            or self.update_interval is None
            or completed % self.update_interval
            or step == self.stop - 1
        ):
            return None
        return self.density_schedule(completed) if completed < self.density_until + self.update_interval else None

    def closes_with_ticket(self, step: int) -> bool:
        """True on the closing step of a phase that ends in a ticket."""
        return self.ticket_index is not None and step == self.stop - 1

    def updates(self) -> list[int]:
        """The run steps that a topology update follows."""
        due = (
            range(self.start + self.update_interval - 1, self.stop, self.update_interval)
            if self.update_interval
            else ()
        )
        return [step for step in sorted({self.start, *due}) if self.drop_fraction(step) is not None]


@dataclass(frozen=True)
class Plan:
    """The timetable of a run in steps."""

    phases: tuple[Phase, ...]
    steps_per_epoch: int
    global_batch: int
    reference_steps: int  # length of the dense run that training FLOPs are compared with

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.phases[-1].stop

    def at(self, step: int) -> Phase:
        """The phase that run step ``step`` belongs to."""
        return next(phase for phase in self.phases if step < phase.stop)


def length_in_steps(length: str, *, steps_per_epoch: int, global_batch: int, reference_batch: int) -> int:
    """``90 epochs``, ``512000 samples`` or ``4000 steps`` (of the reference batch) in steps of ``global_batch``."""
    match = LENGTH.fullmatch(length)
    assert match, length  # checked with the configuration
    number, unit = float(match[1]), match[2].rstrip("s")
    steps = {
        "epoch": number * steps_per_epoch,
        "sample": number / global_batch,
        "step": number * reference_batch / global_batch,
    }[unit]
    return max(1, round(steps)) if number else 0


class _Recipe:
    """Turns the lengths and rates of one configuration into steps and scaled rates."""

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

    def drop(self, config: PhaseConfig, length: int) -> Schedule:
        start = self.strategy.drop_fraction if config.drop_fraction is None else config.drop_fraction
        end = self.strategy.drop_end if config.drop_end is None else config.drop_end
        return {
            "constant": lambda: schedules.constant(start),
            "linear": lambda: schedules.linear(start, end, length),
            "cosine": lambda: schedules.cosine(start, end, length),
            "rigl_cosine": lambda: schedules.rigl_cosine(start, round(0.75 * length)),
        }[config.drop_schedule or self.strategy.drop_schedule]()

    def exploration(self, config: PhaseConfig, *, ticket_index: int | None) -> Phase:
        interval = config.update_interval or self.strategy.update_interval if self.strategy.grow is not None else None
        phase = self.phase(
            config, name="exploration", start=0, ticket_index=ticket_index, opened=False, update_interval=interval
        )
        if self.strategy.initial_density is None:
            return phase
        first, last = self.steps(self.strategy.density_from), self.steps(self.strategy.density_until)
        schedule = (
            schedules.cubic(self.strategy.initial_density, self.final_density, first, last) if first < last else None
        )
        phase = dataclasses.replace(phase, density_schedule=schedule, density_until=last)
        if not any(step + 1 >= last for step in phase.updates()) or schedule is None:
            raise ConfigError(
                f"sparsity.density_until: no update follows {self.strategy.density_until} (step {last}; exploration ends "
                f"at {phase.stop}), so the density would not reach {self.final_density:g}",
                do="end the density schedule earlier, or update more often",
            )
        return phase

    def phase(
        self,
        config: PhaseConfig,
        *,
        name: str,
        start: int,
        ticket_index: int | None,
        opened: bool,
        update_interval: str | None,
    ) -> Phase:
        length = self.steps(config.length)
        interval = self.steps(update_interval) if update_interval else None
        _require_at_most(MAX_STEPS, length, f"steps in {name}")
        _require_at_most(MAX_UPDATES, length // interval if interval else 0, f"topology updates in {name}")
        return Phase(
            name=name,
            start=start,
            stop=start + length,
            lr_schedule=self.lr(config.lr, length),
            drop_schedule=self.drop(config, length),
            update_interval=interval,
            opening_drop=config.opening_drop if opened else None,
            ticket_index=ticket_index,
        )


def _require_at_most(limit: int, num: int, what: str) -> None:
    if num > limit:
        raise ConfigError(
            f"plan: {num} {what} are more than {limit}", do="look at the lengths; --print-plan shows the plan"
        )


def one_phase(config: Config, recipe: _Recipe) -> list[Phase]:
    """Dense, static, SET, RigL, ITOP: one exploration phase, a ticket at the end."""
    return [recipe.exploration(config.plan.exploration, ticket_index=0)]


def refined(config: Config, recipe: _Recipe) -> list[Phase]:
    """EDST ensembles and Sup-tickets: exploration, then refinement phases that each close with a ticket.

    A refinement phase is opened by its large update only when the phase before it closed with a
    ticket: otherwise there is nothing to escape from (so the CIFAR timetable of EDST opens all
    refinements but the first, the ImageNet one all of them).
    """
    plan = config.plan
    assert plan.refinement is not None
    phases = [recipe.exploration(plan.exploration, ticket_index=0 if plan.exploration.ticket else None)]
    for index in range(plan.num_refinements):
        previous = phases[-1]
        ticket_index = index + (1 if plan.exploration.ticket else 0)
        opened = previous.ticket_index is not None
        phase = recipe.phase(
            plan.refinement,
            name=f"refinement-{index + 1}",
            start=previous.stop,
            ticket_index=ticket_index,
            opened=opened,
            update_interval=plan.refinement.update_interval,
        )
        phases.append(phase)
    return phases


@dataclass(frozen=True)
class Timetable:
    """A row of :data:`TIMETABLES`."""

    phases: Callable[[Config, _Recipe], list[Phase]]
    about: str  # what it is and what it needs, for the reference of the configuration


TIMETABLES = {
    "dense": Timetable(one_phase, "one phase without a mask; needs `sparsity.method: dense` and `sparsity.density: 1`"),
    "static": Timetable(one_phase, "one phase whose mask never changes; needs `sparsity.method: static`"),
    "itop": Timetable(
        one_phase,
        "one exploration phase (SET, RigL, ITOP and the other methods that change masks), with a ticket at its end; needs "
        "such a method and an `update_interval` from it or from `plan.exploration`",
    ),
    "edst": Timetable(
        refined,
        "exploration, then `plan.num_refinements` refinement phases that each close with a ticket (EDST ensembles); needs "
        "`plan.refinement` with an `opening_drop` or an `update_interval`; exploration closes with a ticket unless "
        "`plan.exploration.ticket` is false",
    ),
    "sup_tickets": Timetable(
        refined, "as `edst`; exploration always closes with a ticket, which superposition starts from (Sup-tickets)"
    ),
}


def build_plan(config: Config, *, steps_per_epoch: int) -> Plan:
    """The phases of ``config`` in steps.

    Raises:
        ConfigError: when the training set holds less than one global batch.
    """
    if steps_per_epoch < 1:
        raise ConfigError(
            f"train.global_batch: {config.train.global_batch} samples are more than the training set holds",
            do="choose a smaller one",
        )
    recipe = _Recipe(config, steps_per_epoch)
    phases = TIMETABLES[config.plan.timetable].phases(config, recipe)
    _require_at_most(MAX_STEPS, phases[-1].stop, "steps")
    reference = recipe.steps(config.plan.dense_reference) if config.plan.dense_reference else phases[-1].stop
    return Plan(tuple(phases), steps_per_epoch, config.train.global_batch, reference)


def dry_run_plan(plan: Plan, *, global_batch: int) -> Plan:
    """The same phases, two steps of ``global_batch`` samples each, with one topology update where the phase has any."""
    phases = []
    for index, phase in enumerate(plan.phases):
        has_updates = phase.update_interval is not None and phase.opening_drop is None
        shrunk = Phase(
            name=phase.name,
            start=2 * index,
            stop=2 * index + 2,
            lr_schedule=schedules.constant(phase.lr(phase.start)),
            drop_schedule=schedules.constant(phase.drop_schedule(1)),
            update_interval=1 if has_updates else None,
            opening_drop=phase.opening_drop,
            ticket_index=phase.ticket_index,
            density_schedule=schedules.constant(phase.density_schedule(phase.density_until))
            if phase.density_schedule
            else None,
            density_until=1,
        )
        phases.append(shrunk)
    return Plan(tuple(phases), plan.steps_per_epoch, global_batch, phases[-1].stop)


def describe_plan(plan: Plan) -> str:
    """One line per phase, and a warning where updates are few or come just before a ticket."""
    epochs = plan.num_steps / plan.steps_per_epoch
    lines = [
        f"{plan.num_steps} steps, {epochs:g} epochs of {plan.steps_per_epoch} steps, {plan.global_batch} samples a step",
        f"{'phase':15}{'steps':>19}{'epochs':>16}  {'learning rate':26}{'ΔT':>7}{'updates':>9}  ticket",
    ]
    warnings = []
    for phase in plan.phases:
        every = 1 + (phase.stop - phase.start) // SHOWN_RATES
        rates = [phase.lr(step) for step in (*range(phase.start, phase.stop, every), phase.stop - 1)]
        updates = phase.updates()
        opening = f" (opens with {phase.opening_drop:g})" if phase.opening_drop is not None else ""
        ticket = f"ticket-{phase.ticket_index}" if phase.ticket_index is not None else "–"
        if updates and phase.ticket_index is not None:
            since = phase.stop - 1 - updates[-1]
            ticket += f", {since} steps after the last update"
            if phase.update_interval and since < phase.update_interval / 2:
                warnings.append(
                    f"warning: {phase.name}: ticket-{phase.ticket_index} is taken {since} steps after an update, less than ΔT/2: the "
                    f"weights that it replaced (up to {phase.drop_fraction(updates[-1]) or 0:.1%}) are hardly trained"
                )
        if phase.density_schedule is not None:
            until = phase.density_until
            ticket += f", density {phase.density_schedule(0):g} → {phase.density_schedule(until):g} at step {until}"
        if phase.name == "exploration" and phase.update_interval and len(updates) < FEW_UPDATES:
            warnings.append(
                f"warning: exploration: only {len(updates)} topology updates; the papers have hundreds, and R_s grows with them: "
                "lower plan.exploration.update_interval"
            )
        span = f"{phase.start / plan.steps_per_epoch:g}–{phase.stop / plan.steps_per_epoch:g}"
        rate = f"{rates[0]:.4g} … {max(rates):.4g} … {rates[-1]:.4g}"
        interval = str(phase.update_interval or "–")
        steps = f"{phase.start}–{phase.stop - 1}"
        lines.append(
            f"{phase.name:15}{steps:>19}{span:>16}  {rate:26}{interval:>7}{len(updates):>9}  {ticket}{opening}"
        )
    return "\n".join([*lines, *warnings])
