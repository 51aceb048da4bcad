"""Parts ``step``, ``waits``, ``update``, ``compile`` and ``deepspeed``: the time of a step, and what it is made of."""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import loop
from benchmarks.gpu.loop import DROP_FRACTION, Trainer, interleaved, on_device, ratio
from benchmarks.gpu.report import NotRunError, Options, Report
from pipeline.errors import ConfigError, NumericsError
from pipeline.sparse.flops import dense_flops, layer_macs
from pipeline.sparse.strategy import METHODS

# An epoch's images per second of our dense loop must be at least this share of plain torch's, by images per step.
DENSE_SHARE = {256: 0.97, 64: 0.93}
SPARSE = 1.02  # a sparse step / a dense one of ours
WAITS = {"step": 1, "check": 2, "update": 8}  # of the host for the device
UPDATE_MS = 20.0
CHECK_EVERY = 4


def trainer(given: Options, num_images: int, **settings: Any) -> Trainer:
    """Return the trainer of the network that is timed."""
    return Trainer(loop.network(given), num_images=num_images, precision=loop.precision(given), **settings)


def step(given: Options, report: Report) -> None:
    """Time plain torch, our dense step and our sparse step; and what they need."""
    sizes = loop.batch_sizes(given)
    with on_device(given):
        for index, num_images in enumerate(sizes):
            one_size(given, report, num_images, until=(index + 1) / len(sizes))


def one_size(given: Options, report: Report, num_images: int, *, until: float) -> None:
    """Compare the steps at one number of images per step."""
    images, labels = loop.batch(given, num_images, loop.side(given), dtype=loop.precision(given))
    trainers = {
        "dense": trainer(given, num_images, method="dense"),
        "sparse": trainer(given, num_images),
        "unchecked": trainer(given, num_images, check_every=0),
    }
    legs: dict[str, Callable[[], object]] = {
        "plain": loop.plain_step(loop.network(given), images, labels),
        **{name: lambda each=each: each.step(images, labels) for name, each in trainers.items()},  # type: ignore[misc]
    }
    times = interleaved(legs, report, until=until)
    medians = {name: statistics.median(of_leg) for name, of_leg in times.items()}
    rates = {name: 1000 * num_images / ms for name, ms in medians.items()}
    value, text = ratio(times["sparse"], times["dense"])
    report.at_most(f"sparse / dense, {num_images}", value, SPARSE, text, **medians)
    value, text = ratio(times["dense"], times["plain"])
    share = DENSE_SHARE.get(num_images, 0.9)
    report.at_least(f"images/s dense / plain, {num_images}", 1 / value, share, f"{1 / value:.3f}; times {text}")
    value, text = ratio(times["sparse"], times["unchecked"])
    report.say(f"with / without checks, {num_images}", text, ratio=value)
    report.say(f"images/s, {num_images}", ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()), **rates)
    # a multiply-accumulate is two operations, and the backward pass costs twice the forward pass
    tflops = 3 * dense_flops(layer_macs(loop.network(given), (3, images.shape[2], images.shape[3]))) / 1e12
    done = {name: tflops * rate for name, rate in rates.items()}
    text = ", ".join(f"{name} {each:.1f}" for name, each in done.items())
    if images.is_cuda and (peak := loop.peak_tflops()) is not None:
        text += f"; of the peak {done['dense'] / peak:.0%} (dense)"
    report.say(f"dense-equivalent TFLOP/s, {num_images}", text, **done)
    if images.is_cuda:
        memory = {name: peak_gib(leg) for name, leg in legs.items()}
        text = ", ".join(f"{name} {gib:.2f}" for name, gib in memory.items())
        report.say(f"peak GiB above weights, {num_images}", text, **memory)


def peak_gib(leg: Callable[[], object]) -> float:
    """Return by how many GiB the allocated memory rises in one call."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    leg()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


# -- waits and launches


def waits(given: Options, report: Report) -> None:
    """Count where the host waits in an ordinary step, a check and an update, and what each launches."""
    num_images = min(loop.batch_sizes(given))
    images, labels = loop.batch(given, num_images, loop.side(given), dtype=loop.precision(given))
    with on_device(given):
        ours = trainer(given, num_images, check_every=CHECK_EVERY)
        steps_of = {"step": 1, "check": CHECK_EVERY - 1, "update": 1}  # after a check
        for kind, limit in WAITS.items():
            update = DROP_FRACTION if kind == "update" else None
            found = []
            for way in (counted_waits, counted_launches):
                # up to the step before the one that is looked at, which is not the first: that one is checked as well
                while ours.sparsifier.steps < CHECK_EVERY or (ours.sparsifier.steps + 1 - steps_of[kind]) % CHECK_EVERY:
                    ours.step(images, labels)
                found.append(way(lambda update=update: ours.step(images, labels, update)))  # type: ignore[misc]
            num_waits, launches = found
            if given.device == "cuda":
                report.at_most(f"waits in a{'n' * (kind == 'update')} {kind}", len(num_waits), limit)
            report.say(f"launches in a{'n' * (kind == 'update')} {kind}", ", ".join(launches))
        for optimizer in ("sgd", "adamw"):
            bad_step(given, report, optimizer)


def bad_step(given: Options, report: Report, optimizer: str) -> None:
    """Check that a step whose loss is NaN changes no weight, and ends training before the next one changes any."""
    ours = Trainer(loop.small_network(), num_images=16, optimizer=optimizer)
    images, labels = loop.batch(given, 16, 32, num_classes=10)
    ours.step(images, labels)
    before = [parameter.detach().clone() for parameter in ours.engine.model.parameters()]
    error = ""
    try:
        ours.step(torch.full_like(images, torch.nan), labels)
        ours.step(images, labels)
    except NumericsError as caught:
        error = caught.what
    is_kept = all(map(torch.equal, before, ours.engine.model.parameters()))
    text = f"weights {'kept' if is_kept else 'changed'}; {error.partition(';')[0] or 'no error'}"
    report.check(f"a NaN in a step, {optimizer}", is_kept and bool(error), text, "no weight changed, NumericsError")


def counted_waits(leg: Callable[[], object]) -> list[str]:
    """Return what made the host wait for the device in one call: torch's own reads, and calls to synchronise."""
    found: list[str] = []
    with patched_synchronisation(found), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.set_sync_debug_mode("warn")
        try:
            leg()
        finally:
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.set_sync_debug_mode("default")
    return found + [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]


@contextmanager
def patched_synchronisation(found: list[str]) -> Iterator[None]:
    """Note calls that wait for a device, a stream or an event, which torch does not warn of."""
    places = [(torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda.Event, "synchronize")]
    real = [getattr(owner, name) for owner, name in places]

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            found.append(function.__qualname__)
            return function(*arguments, **named)

        return call

    try:
        for (owner, name), function in zip(places, real, strict=True):
            setattr(owner, name, noting(function))
        yield
    finally:
        for (owner, name), function in zip(places, real, strict=True):
            setattr(owner, name, function)


def counted_launches(leg: Callable[[], object]) -> list[str]:
    """Return numbers of launches and copies, as torch's profiler sees them; on a CPU the number of operations."""
    has_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_gpu else [])]) as seen:
        leg()
        loop.synchronize()
    counts = {event.key: event.count for event in seen.key_averages()}
    if not has_gpu:
        return [f"operations {sum(count for key, count in counts.items() if key.startswith('aten::'))}"]
    kinds = {"kernels": ("cudaLaunch", "cuLaunch"), "copies": ("cudaMemcpy",), "fills": ("cudaMemset",)}
    return [f"{kind} {sum(counts[key] for key in counts if key.startswith(names))}" for kind, names in kinds.items()]


# -- updates


def update(given: Options, report: Report) -> None:
    """Time what a step with a topology update does after the backward pass, above an ordinary step."""
    num_images = 8
    images, labels = loop.batch(given, num_images, 64, dtype=loop.precision(given))
    kinds = {
        "rigl layer": METHODS["rigl"],
        "rigl global": dataclasses.replace(METHODS["rigl"], scope="global"),
        "set layer": METHODS["set"],
    }
    with on_device(given):
        for index, (name, strategy) in enumerate(kinds.items()):
            ours = trainer(given, num_images, method=strategy, check_every=0)
            one_update(report, name, ours, images, labels, until=(index + 1) / len(kinds))


def one_update(report: Report, name: str, ours: Trainer, images: Tensor, labels: Tensor, *, until: float) -> None:
    """Time ordinary steps and steps with an update in turn, after their backward pass."""

    def after_backward(drop: float | None) -> Callable[[], None]:
        loss, norm = ours.backward(images, labels, drop)
        return lambda: ours.finish(loss, norm, drop)

    pairs: list[tuple[float, float]] = []
    while len(pairs) < 3 or (report.has_time(until) and len(pairs) < 50 and not report.is_quick):
        ordinary, whole = (1000 * loop.seconds_of(after_backward(drop)) for drop in (None, DROP_FRACTION))
        pairs.append((ordinary, whole))
    ordinary, whole = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
    text = f"{whole - ordinary:.1f} ms above an ordinary step ({whole:.1f} and {ordinary:.1f} ms after backward)"
    report.at_most(f"update {name}", whole - ordinary, UPDATE_MS, text)
    if images.is_cuda:
        gib = peak_gib(after_backward(DROP_FRACTION))
        report.say(f"peak GiB, update {name}", f"{gib:.2f}", gib=gib)


# -- torch.compile


def compiled(given: Options, report: Report) -> None:
    """Compare compiled with eager training: the time of a step, gradients, and masks when compiled twice."""
    try:
        if not given.is_quick:
            compiled_time(given, report)
        with on_device(given, is_deterministic=True, tf32="none"):  # which stays so in this process
            compiled_bits(given, report)
    except ConfigError as error:
        raise NotRunError(f"{error.what}; do: {error.do}") from error


def compiled_time(given: Options, report: Report) -> None:
    """Time a compiled step and an eager one, and the first compiled step."""
    num_images = max(loop.batch_sizes(given))
    images, labels = loop.batch(given, num_images, loop.side(given), dtype=loop.precision(given))
    with on_device(given):
        legs = {
            name: trainer(given, num_images, compile=is_compiled)
            for name, is_compiled in (("compiled", True), ("eager", False))
        }
        seconds = loop.seconds_of(lambda: legs["compiled"].step(images, labels))
        report.say("first compiled step", f"{seconds:.0f} s", seconds=seconds)
        calls = {name: lambda each=each: each.step(images, labels) for name, each in legs.items()}  # type: ignore[misc]
        value, text = ratio(*interleaved(calls, report, until=0.8).values())
        report.say(f"compiled / eager, {num_images}", text, ratio=value)


def compiled_bits(given: Options, report: Report) -> None:
    """Check gradients against eager, and that a network compiled anew trains with the same bits."""
    images, labels = loop.batch(given, 16, 32, num_classes=10)
    found: dict[str, tuple[Tensor, dict[str, str], int]] = {}
    for name, is_compiled in (("eager", False), ("compiled", True), ("compiled anew", True)):
        torch.compiler.reset()
        ours = Trainer(loop.tiny_network(), num_images=16, compile=is_compiled)
        loss, norm = ours.backward(images, labels)
        gradient = torch.cat([p.grad.flatten() for p in ours.engine.model.parameters() if p.grad is not None])
        ours.finish(loss, norm)
        for index in range(8):
            ours.step(images, labels, DROP_FRACTION if index % 4 == 3 else None)
        num_active = sum(int(mask.sum()) for mask in ours.sparsifier.masks.values())
        found[name] = gradient, ours.digests(), num_active
    eager, once, anew = found.values()
    error = float((once[0] - eager[0]).abs().max() / eager[0].abs().max())
    text = f"largest difference {error:.1e} of the largest component"
    report.check("compiled gradient", error < 1e-4, text, "< 1e-4 in fp32", error=error)
    report.check("compiled numbers", once[2] == eager[2], f"{once[2]} and {eager[2]} active weights", "equal")
    report.check("compiled twice", once[1] == anew[1], "weights and masks after two updates", "equal bits")
    text = (
        "equal" if once[1]["history"] == eager[1]["history"] else "not equal: two scores were closer than the rounding"
    )
    report.say("masks, compiled and eager", text)


def deepspeed(given: Options, report: Report) -> None:
    """Compare the step in the engine deepspeed with the engine torch."""
    if importlib.util.find_spec("deepspeed") is None:
        raise NotRunError("deepspeed is not installed")
    num_images = max(loop.batch_sizes(given))
    images, labels = loop.batch(given, num_images, loop.side(given), dtype=loop.precision(given))
    with on_device(given):
        legs = {name: trainer(given, num_images, engine=name) for name in ("deepspeed", "torch")}
        calls = {name: lambda each=each: each.step(images, labels) for name, each in legs.items()}  # type: ignore[misc]
        value, text = ratio(*interleaved(calls, report, until=0.8).values())
        report.say(f"deepspeed / torch, {num_images}", text, ratio=value)
        found = counted_waits(calls["deepspeed"])
        report.say("waits in a step, deepspeed", str(len(found)), waits=len(found))
