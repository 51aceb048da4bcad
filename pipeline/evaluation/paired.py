"""Means over seeds, and paired differences with confidence intervals. Needs only the standard library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """Mean of several values."""

    mean: float
    standard_error: float | None  # sample standard deviation / √n; None for a single value
    num_values: int


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, and the interval that contains the true mean with the stated confidence."""

    mean: float
    low: float | None  # None for a single pair
    high: float | None
    num_pairs: int


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean of at least one value, with its standard error."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(fmean(values), error, len(values))


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], *, confidence: float = CONFIDENCE
) -> Difference | None:
    """Return the mean of ``values[seed] − baseline[seed]`` over the seeds that both have; None without such a seed.

    The interval is mean ± t · s/√n, with the sample standard deviation s of the n differences and
    Student's t with n − 1 degrees of freedom. It assumes that differences are normally distributed
    over seeds; between the networks of one seed everything else is equal (images, initialisation).
    """
    differences = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    if not differences:
        return None
    found = mean_of(differences)
    if found.standard_error is None:
        return Difference(found.mean, None, None, 1)
    margin = critical_t(confidence, found.num_values - 1) * found.standard_error
    return Difference(found.mean, found.mean - margin, found.mean + margin, found.num_values)


def critical_t(confidence: float, degrees: int) -> float:
    """Return the t with P(|T| <= t) = ``confidence``, for Student's t with ``degrees`` degrees of freedom.

    Example: ``critical_t(0.95, 2)`` is 4.3027, for three seeds.
    """
    low, high = 0.0, math.pi / 2  # of θ = arctan(t/√degrees), on which the probability depends monotonically
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _probability(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _probability(theta: float, degrees: int) -> float:
    """Return P(|T| <= √degrees · tan θ), a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    cosine, is_odd = math.cos(theta), degrees % 2
    term, total = cosine if is_odd else 1.0, 0.0
    for k in range(1 + is_odd, degrees, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return (theta + math.sin(theta) * total) * 2 / math.pi if is_odd else math.sin(theta) * total
