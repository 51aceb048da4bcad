"""What becomes of a run when its ranks have ended: start them again in place, or exit, and with which code.

Standard library only. A *round* is the life of the ranks between two starts; a *node* is one call of
``launchers.run``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline import errors

EXIT_DIR = "TICKETWORKS_EXIT_DIR"  # in which each rank that fails leaves its code, as rank-<RANK>
PRIORITY = (  # the first of these that any rank has is the cause; a lost peer (76) is never a cause
    *(errors.IntegrityError.code, errors.NumericsError.code, errors.Preempted.code),
    *(
        errors.ConfigError.code,
        errors.DataError.code,
        errors.WriteError.code,
        errors.PermissionDenied.code,
        errors.ServiceError.code,
    ),
    errors.RunError.code,
    errors.PeerError.code,
)
FINAL = (  # a retry would end the same way
    errors.ConfigError.code,
    errors.DataError.code,
    errors.PermissionDenied.code,
    errors.IntegrityError.code,
)
DAY_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Result:
    """How the ranks of one node ended.

    Attributes:
        code: their most informative exit code; None: the node was lost.
        is_leaving: the node does not take part in the next round, because it was asked to stop or
            lacks a service.
    """

    code: int | None
    is_leaving: bool = False


@dataclass(frozen=True)
class Verdict:
    """What all nodes do after a round. ``code``: they exit with it; None: they start the ranks again."""

    code: int | None
    why: str = ""


def agreed_code(own: int, codes: Sequence[int]) -> int:
    """Return the exit code of several ranks or nodes.

    Args:
        own: exit code of what started them; negative if a signal killed it.
        codes: exit codes that they have left.
    """
    if own == 0:
        return 0
    ranked = [code for code in PRIORITY if code in codes]
    return [*ranked, *codes, own if own > 0 else errors.PeerError.code][0]


class Judge:
    """Decides after each round; remembers how often the ranks have failed by themselves.

    Args:
        restarts: how often within a day the ranks are started again after a failure of their own; 0: a
            round is never followed by another one. Rounds that end because a node was lost, or was asked
            to stop, are not counted.
    """

    def __init__(self, restarts: int) -> None:
        self.restarts = restarts
        self._failures: list[float] = []  # when, in seconds
        self._was_not_finite = False

    def decide(self, results: Mapping[int, Result], now: float) -> Verdict:
        """Return the verdict on a round.

        Args:
            results: by number of the node, of all nodes.
            now: a clock's time in seconds, such as ``time.monotonic()``.
        """
        codes = [result.code for result in results.values() if result.code is not None]
        gone = {node: result for node, result in results.items() if result.code is None or result.is_leaving}
        if not gone and not any(codes):
            return Verdict(0)
        code = agreed_code(errors.PeerError.code, [code for code in codes if code])
        if self.restarts == 0 or code in FINAL or (code == errors.WriteError.code and not gone):
            return Verdict(code)
        if gone:
            return Verdict(None, "; ".join(_of_node(node, result) for node, result in gone.items()))
        others = [code for code in codes if code not in (0, errors.Preempted.code)]
        if not others:  # all ranks were asked, such as by --stop-after
            return Verdict(errors.Preempted.code)
        code = agreed_code(errors.PeerError.code, others)
        if code == errors.NumericsError.code:
            if self._was_not_finite:
                return Verdict(code, "a loss or gradient was not finite again")
            self._was_not_finite = True
            return Verdict(None, "a loss or gradient was not finite; this is tried again once")
        self._failures = [when for when in self._failures if now - when < DAY_SECONDS]
        if len(self._failures) >= self.restarts:
            return Verdict(code, f"the ranks have failed {len(self._failures) + 1} times within a day")
        self._failures.append(now)
        return Verdict(
            None, f"ranks failed with exit code {code}, restart {len(self._failures)} of {self.restarts} within a day"
        )

    def decide_alone(self, own: int) -> Verdict:
        """Return the verdict of a node that has lost node 0, which should have decided."""
        if own in FINAL or self.restarts == 0:
            return Verdict(own)
        return Verdict(None, "node 0 was lost")


def _of_node(node: int, result: Result) -> str:
    if result.code is None:
        return f"node {node} was lost"
    return f"node {node} has left with exit code {result.code}"
