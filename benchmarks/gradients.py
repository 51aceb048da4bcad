"""Measure gradient averaging between two hosts: ``python -m benchmarks.gradients``. Linux, root.

The hosts are network namespaces with real TCP between them, at loopback speed, 1 Gbit/s and 200
Mbit/s, with one rank of one thread on each. Parts, for ``--only``:

C1   bytes: whole / packed, on ordinary steps, and on average with RigL and an update every 100 steps
C2   time of averaging alone: whole / packed
C3   a whole step of ResNet-18 (64 px, 16 images per rank): packed / torch DDP, and every other
     engine / torch DDP
D1   our DeepSpeed engine with whole gradients / torch DDP

C1 and C2 are measured at densities 0.05, 0.1 and 0.2, C3 at 0.1.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.support.bars import Bounds, Figure, Options, Results, Rounds, bar, options
from benchmarks.support.ranks import answer_of
from tools.hosts import INTERFACE, hosts, unsupported_reason

PARTS = ("C1", "C2", "C3", "D1")
MODELS = ("resnet18", "resnet50")
DENSITIES = (0.05, 0.1, 0.2)
LINKS: dict[str, float | None] = {"loopback": None, "1 Gbit/s": 1000, "200 Mbit/s": 200}
BOUNDS = {
    "C1 resnet50 0.1": Bounds("≥ 9.8", "9.8", "9.81"),
    "C2 resnet50 0.1 1 Gbit/s": Bounds("≥ 8.0", "9.3", "9.8"),
    "C3 loopback": Bounds("≤ 0.87", "0.85", "0.79"),
    "C3 1 Gbit/s": Bounds("≤ 0.58", "0.48", "0.41"),
    "D1 loopback": Bounds("≤ 1.05", "0.98", "0.79"),
}
INTERVAL = 100  # steps between updates (ΔT) in C1's mean
PORT = 29400  # free, as nothing else listens in these namespaces


def on_two_hosts(task: dict[str, Any], mbit_per_second: float | None) -> Any:
    """Rounds ``task`` in ``benchmarks.support.gradients_worker`` on two hosts; returns rank 0's answer."""
    with hosts(2, mbit_per_second=mbit_per_second) as at:
        place = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": at[0].address, "MASTER_PORT": str(PORT)}
        environ = place | {"GLOO_SOCKET_IFNAME": INTERFACE}
        return answer_of(
            "benchmarks.support.gradients_worker", task, environ=environ, commands=[host.command for host in at]
        )


def measure_averaging(model: str, given: Options, results: Results) -> None:
    """Measure C1 and C2."""
    keys = [f"{density:g}" for density in DENSITIES]
    for index, (link, rate) in enumerate(LINKS.items() if "C2" in given.only else [("loopback", None)]):
        task = {"kind": "averaging", "name": model, "densities": DENSITIES, "rounds": given.rounds}
        found = [on_two_hosts(task, rate) for _ in range(given.runs)]
        if index == 0 and "C1" in given.only:
            num_bytes = found[0]["bytes"]
            for key in keys:
                ordinary = num_bytes["dense"] / num_bytes[key]
                mean = num_bytes["dense"] * INTERVAL / (num_bytes["dense"] + (INTERVAL - 1) * num_bytes[key])
                name = f"C1 {model} {key}"
                must = f" must be {BOUNDS[name].must} and ≥ 9.0" if name in BOUNDS else ""
                sizes = f"{num_bytes['dense']:,} / {num_bytes[key]:,} bytes"
                text = f"{ordinary:.4g}, with RigL every {INTERVAL} steps {mean:.4g}{must}  ({sizes})"
                results.add(Figure(name, text, {"value": ordinary, "with_updates": mean}))
        if "C2" not in given.only:
            return
        for key in [*keys, *(f"{key} bf16" for key in keys)]:
            name = f"C2 {model} {key} {link}"
            results.add(bar(name, [pairs(result["ms"], "dense", key) for result in found], BOUNDS.get(name)))


def measure_steps(given: Options, results: Results) -> None:
    """Measure C3 and D1."""
    for link, rate in LINKS.items():
        task = {"kind": "steps", "density": 0.1, "rounds": given.rounds}
        found = [on_two_hosts(task, rate) for _ in range(given.runs)]
        legs = [leg for leg in found[0] if leg not in ("torch DDP", "torch packed", "deepspeed dense")]
        if "C3" in given.only:
            results.add(
                bar(
                    f"C3 {link}",
                    [pairs(result, "torch packed", "torch DDP") for result in found],
                    BOUNDS.get(f"C3 {link}"),
                )
            )
            base = statistics.median(ms for result in found for ms in result["torch DDP"])
            ratios = {leg: statistics.median(ms for result in found for ms in result[leg]) / base for leg in legs}
            text = "a step, torch DDP = 1: " + ", ".join(f"{leg} {ratio:.2f}" for leg, ratio in ratios.items())
            results.add(Figure(f"steps {link}", text, ratios))
        if "D1" in given.only:
            results.add(
                bar(
                    f"D1 {link}",
                    [pairs(result, "deepspeed dense", "torch DDP") for result in found],
                    BOUNDS.get(f"D1 {link}"),
                )
            )


def pairs(times: dict[str, list[float]], numerator: str, denominator: str) -> Rounds:
    return list(zip(times[numerator], times[denominator], strict=True))


def main() -> None:
    given = options(__doc__, PARTS, models=MODELS, quick_model="resnet18")
    if reason := unsupported_reason():
        raise SystemExit(f"cannot emulate hosts: {reason}")
    results = Results()
    if {"C1", "C2"} & set(given.only):
        for model in given.models:
            measure_averaging(model, given, results)
    if {"C3", "D1"} & set(given.only):
        measure_steps(given, results)
    results.write(given.json)


if __name__ == "__main__":
    main()
