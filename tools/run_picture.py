"""``python -m tools.run_picture``: write ``docs/assets/run.svg``, the life of the run of the zoo's first ticket.

Learning rate and phases come from the run's plan, topology updates and R_s from its ``metrics.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.config.load import load_config
from pipeline.plan import build_plan, steps_per_epoch_of

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "zoo" / "fashion_mnist_s90"
PICTURE = ROOT / "docs" / "assets" / "run.svg"
WIDTH, HEIGHT = 1000, 470
LEFT, RIGHT = 150, 930  # of the axis of steps
GREEN, ORANGE, BLUE, VIOLET = "#00796b", "#b9770e", "#1565c0", "#5e35b1"
HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"
 font-family="sans-serif" font-size="15">
<title>A run of Sup-tickets: exploration, three refinement phases, four tickets, superposition and ensemble</title>
<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>"""
RESULTS = (
    ("superposition", "weights averaged: one network", 400),
    ("ensemble", "predictions averaged: four networks", 780),
)


def svg() -> str:
    """Return the picture."""
    return "\n".join([HEAD, *drawing(), "</svg>"]) + "\n"


def drawing() -> Iterator[str]:
    """Yield what is drawn, from top to bottom."""
    config = load_config(str(RUN / "config.yaml"))
    plan = build_plan(config, steps_per_epoch=steps_per_epoch_of(config, config.data.train_samples))
    records = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    updates = [(each["step"] + 1, each["metrics"]) for each in records if "mask/r_s" in each.get("metrics", {})]
    density = updates[0][1]["mask/density"]

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / plan.num_steps

    for y, *words in ((55, "phases"), (120, "learning rate"), (188, "topology", "updates"), (262, "R_s"),
                      (340, "tickets"), (428, "results")):  # fmt: skip
        for index, word in enumerate(words):
            yield label(20, y + 18 * index, word, weight="bold", anchor="start")
    for phase in plan.phases:
        colour, fill = (GREEN, "#d7ece8") if phase.name == "exploration" else (ORANGE, "#fdebd0")
        yield box(x(phase.start), 30, x(phase.stop) - x(phase.start), 40, colour, fill)
        yield label((x(phase.start) + x(phase.stop)) / 2, 55, phase.name.replace("-", " "))
        yield line((x(phase.stop), 72), (x(phase.stop), 320), "#999999", dashes="2 4")
    rates = [plan.at(step).lr(step) for step in range(plan.num_steps)]
    yield curve([(x(step), 150 - 60 * rate / max(rates)) for step, rate in enumerate(rates)][::6], "#333333")
    yield line((LEFT, 210), (RIGHT, 210), "#999999")
    for step, metrics in updates:
        colour = GREEN if step <= plan.phases[0].stop else ORANGE
        yield line((x(step), 210), (x(step), 208 - 80 * metrics["mask/drop_fraction"]), colour, width=3)
    explored = [(0, density), *((step, metrics["mask/r_s"]) for step, metrics in updates)]
    ends = [*explored[1:], (plan.num_steps, 0)]
    steps = [(at, share) for (start, share), (end, _) in zip(explored, ends, strict=True) for at in (start, end)]
    yield curve([(x(step), 290 - 130 * share) for step, share in steps], VIOLET)
    yield line((LEFT, 290 - 130 * density), (RIGHT, 290 - 130 * density), VIOLET, dashes="4 4")
    for share in (density, explored[-1][1]):
        yield label(RIGHT + 6, 295 - 130 * share, f"{share:.2f}", colour=VIOLET, anchor="start")
    for name, about, centre in RESULTS:
        for phase in plan.phases:
            yield line((x(phase.stop), 350), (centre, 404), "#8bb4de")
        yield box(centre - 140, 404, 280, 48, BLUE, "#e3f0ff")
        yield label(centre, 424, name, weight="bold")
        yield label(centre, 443, about)
    for phase in plan.phases:
        yield box(x(phase.stop) - 34, 320, 68, 30, BLUE, "#e3f0ff")
        yield label(x(phase.stop), 340, f"ticket {phase.ticket_index}")


def box(x: float, y: float, width: float, height: float, colour: str, fill: str) -> str:
    """Return a rectangle."""
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" stroke="{colour}" fill="{fill}"/>'


def label(
    x: float, y: float, text: str, *, colour: str = "#222222", weight: str = "normal", anchor: str = "middle"
) -> str:
    """Return a line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-weight="{weight}" text-anchor="{anchor}">{text}</text>'


def line(start: Sequence[float], end: Sequence[float], colour: str, *, width: int = 1, dashes: str = "none") -> str:
    """Return a straight line."""
    return (
        f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" stroke="{colour}" '
        f'stroke-width="{width}" stroke-dasharray="{dashes}"/>'
    )


def curve(points: Sequence[tuple[float, float]], colour: str) -> str:
    """Return straight lines from point to point."""
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="2"/>'


if __name__ == "__main__":
    PICTURE.write_text(svg())
    print(f"wrote {PICTURE}")
