"""Measure what all safety checks cost (R1): a ResNet-50 training step with them / one without.

``python -m benchmarks.checks``

Two ranks over loopback, one thread each, 16 images of 64 px per rank: the cheaper the step, the
more the checks weigh. Steps of the loop of launchers/train.py (torch engine, packed gradients, 90%
ERK) run alternately with and without the checks, at the default intervals of the ImageNet recipe:

* in every step: the guard of the loader, the norm of the gradient, the agreement of the ranks
  (is the loss finite, was the run asked to stop), the sums of loss and top-1 for the next report;
* every 10 steps: masks, digests and pruned weights are checked and compared between ranks;
* too rare for a round, so counted as the time of one / its interval: a report every 50 steps (the
  ranks' times are gathered, a line is written to metrics.jsonl), and a checkpoint every epoch of
  1,251 steps, until it is on disk.

Not counted: checks at the start and in topology updates, and what a thread sends to a tracking
server.
"""

from __future__ import annotations

from typing import Any

from benchmarks.support.bars import Bounds, Figure, Options, Results, bar, options
from benchmarks.support.ranks import answer_of
from pipeline.distributed.rank_variables import free_port

BOUNDS = Bounds("≤ 1.03", "1.01", "1")


def on_two_ranks(task: dict[str, Any]) -> Any:
    """Rounds ``task`` in ``benchmarks.support.checks_worker`` on two ranks; returns rank 0's answer."""
    environ = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return answer_of(
        "benchmarks.support.checks_worker", task, environ=environ | {"CUDA_VISIBLE_DEVICES": ""}, commands=[list, list]
    )


def measure(model: str, given: Options, results: Results) -> None:
    """Measure R1, and the time of each check that does not run in every step."""
    side, num_images = (32, 4) if given.is_quick else (64, 16)
    task = {"model": model, "side": side, "num_images": num_images, "rounds": given.rounds, "threads": given.threads}
    runs, rare = [], {}
    for _ in range(given.runs):
        result = on_two_ranks(task)
        num_steps = result["check_every"]
        rare_ms = num_steps * sum(result[f"{what}_ms"] / result[f"{what}_every"] for what in ("report", "save"))
        runs.append([(checked + rare_ms, unchecked) for checked, unchecked in result["rounds"]])
        rare = {what: (result[f"{what}_ms"], result[f"{what}_every"]) for what in ("check", "report", "save")}
    r1 = bar("R1", runs, BOUNDS)
    results.add(r1)
    step_ms = r1.denominator_ms / num_steps
    shares = {what: ms / every / step_ms for what, (ms, every) in rare.items()}
    names = {"check": "masks and weights checked", "report": "a report", "save": "a checkpoint"}
    text = [f"{names[what]} {ms:.1f} ms every {every} steps ({shares[what]:.2%})" for what, (ms, every) in rare.items()]
    numbers = {"step_ms": step_ms} | {f"{what}_ms": ms for what, (ms, _) in rare.items()}
    results.add(Figure("R1 parts", f"of steps of {step_ms:.0f} ms: {', '.join(text)}", numbers))


def main() -> None:
    given = options(__doc__, ("R1",), models=("resnet50",), quick_model="cifar_resnet20")
    results = Results()
    measure(given.models[0], given, results)
    results.write(given.json)


if __name__ == "__main__":
    main()
