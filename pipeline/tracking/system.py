"""Processor, memory, network and GPUs of rank 0's machine while training goes on, under the names that MLflow uses."""

from __future__ import annotations

import contextlib
import importlib
import logging
import statistics
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from pipeline.errors import RunError
from pipeline.tracking.tracker import NullTracker, Tracker

logger = logging.getLogger(__name__)

SAMPLES = 6  # of each record, which holds their means
MEGABYTE = 1e6


@contextlib.contextmanager
def monitored(tracker: Tracker, *, every_seconds: float) -> Iterator[None]:
    """Report ``system/*`` to the tracker from a background thread, and once more at the end of the block.

    Args:
        tracker: gets the metrics, at the last step that it has seen.
        every_seconds: time from one record to the next; 0: report nothing.
    """
    if isinstance(tracker, NullTracker) or not every_seconds:
        yield
        return
    is_over = threading.Event()
    arguments = (tracker, every_seconds, is_over)
    thread = threading.Thread(target=_report_until_over, args=arguments, name="system metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(timeout=5.0)


def _report_until_over(tracker: Tracker, every_seconds: float, is_over: threading.Event) -> None:
    """Run in the thread. Nothing that goes wrong here concerns training."""
    try:
        with contextlib.ExitStack() as held:
            sample = sampler(held)
            while True:
                samples = []
                for _ in range(SAMPLES):
                    is_over.wait(every_seconds / SAMPLES)
                    samples.append(sample())
                    if is_over.is_set():
                        break
                means = {key: statistics.fmean(each[key] for each in samples if key in each) for key in samples[-1]}
                # a run that fails before its first step leaves no record of a step, and its folder may be used again
                if tracker.last_step is not None:
                    tracker.log_metrics(means, step=tracker.last_step)
                if is_over.is_set():
                    return
    except (psutil.Error, OSError, RunError) as error:
        logger.debug("system metrics end: %s", error)


def sampler(held: contextlib.ExitStack) -> Callable[[], dict[str, float]]:
    """Return a function that measures the machine now: metric -> value. ``held`` closes what it opens."""
    process, sent_before = psutil.Process(), psutil.net_io_counters()
    gpus = _open_gpus(held)
    psutil.cpu_percent()  # later calls give the share since the call before

    def sample() -> dict[str, float]:
        memory, network = psutil.virtual_memory(), psutil.net_io_counters()
        metrics = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
            "system/process_memory_megabytes": process.memory_info().rss / MEGABYTE,
        }
        if network is not None and sent_before is not None:  # None in a container without network
            metrics |= {
                "system/network_receive_megabytes": (network.bytes_recv - sent_before.bytes_recv) / MEGABYTE,
                "system/network_transmit_megabytes": (network.bytes_sent - sent_before.bytes_sent) / MEGABYTE,
            }
        for index, gpu in enumerate(gpus):
            metrics |= {f"system/gpu_{index}_{name}": value for name, value in _of_gpu(*gpu).items()}
        return metrics

    return sample


def _open_gpus(held: contextlib.ExitStack) -> list[tuple[Any, Any]]:
    """Return (library, handle) of each NVIDIA GPU of this machine; none without nvidia-ml-py or a driver."""
    try:
        pynvml = importlib.import_module("pynvml")  # of the extra gpu
        pynvml.nvmlInit()
    except Exception as error:  # it is not installed, or raises one of many classes
        logger.debug("no GPU metrics: %s", error)
        return []
    held.callback(pynvml.nvmlShutdown)
    return [(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(pynvml.nvmlDeviceGetCount())]


def _of_gpu(pynvml: Any, handle: Any) -> dict[str, float]:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    metrics = {
        "memory_usage_megabytes": memory.used / MEGABYTE,
        "memory_usage_percentage": 100 * memory.used / memory.total,
    }
    with contextlib.suppress(pynvml.NVMLError):  # not every GPU, or share of one, reports these
        metrics["utilization_percentage"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    with contextlib.suppress(pynvml.NVMLError):
        metrics["power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    return metrics
