"""What follows when the ranks of a round have ended: a table of cases."""

from __future__ import annotations

import pytest

from launchers.verdict import DAY_SECONDS, Judge, Result, Verdict

LOST = Result(None)
DRAINED = Result(75, is_leaving=True)


def result(code: int) -> Result:
    return Result(code)


@pytest.mark.parametrize(
    ("results", "code"),
    [
        ([result(0), result(0)], 0),
        ([result(76), result(64)], 64),
        ([result(76), LOST, result(65)], 65),  # a retry would fail as well, whoever was lost
        ([result(78), result(76)], 78),
        ([result(77)], 77),
        ([result(73), result(76)], 73),
        ([result(73), LOST], None),  # the file of a lost node's rank has not come
        ([result(75), result(75)], 75),  # --stop-after, or a signal to the ranks
        ([result(75), DRAINED], None),  # only one node was asked to stop
        ([result(75), LOST], None),
        ([result(0), LOST], None),
        ([result(76), Result(69, is_leaving=True)], None),  # its service may be there on another node
        ([result(76), result(1)], None),
        ([result(75), result(76)], None),  # a rank was killed while the others saved
        ([result(76)], None),
        ([result(79), result(79)], None),
    ],
)
def test_a_round_is_followed_by_another_or_by_the_end(results: list[Result], code: int | None) -> None:
    assert Judge(3).decide(dict(enumerate(results)), 0.0).code == code


@pytest.mark.parametrize(
    ("results", "code"), [([result(0), LOST], 76), ([result(76), result(1)], 1), ([result(79)], 79), ([DRAINED], 75)]
)
def test_without_restarts_the_first_failure_ends_the_run(results: list[Result], code: int) -> None:
    assert Judge(0).decide(dict(enumerate(results)), 0.0) == Verdict(code)


def test_failures_are_counted_within_a_day_and_lost_nodes_are_not() -> None:
    judge = Judge(2)

    def after(code: int | None, now: float) -> int | None:
        return judge.decide({0: Result(76), 1: Result(code)}, now).code

    assert after(1, 0.0) is None
    assert [after(None, 1.0) for _ in range(10)] == [None] * 10
    assert after(1, 2.0) is None
    assert after(1, 3.0) == 1  # the third
    assert after(1, DAY_SECONDS + 1.0) is None  # the first is forgotten


def test_a_bad_loss_is_tried_again_once() -> None:
    judge = Judge(3)
    assert judge.decide({0: Result(79)}, 0.0).code is None
    assert judge.decide({0: Result(76)}, 1.0).code is None
    assert judge.decide({0: Result(79)}, 2 * DAY_SECONDS).code == 79


def test_a_node_that_has_lost_node_0_decides_alone() -> None:
    assert [Judge(3).decide_alone(code).code for code in (0, 76, 75, 64, 78)] == [None, None, None, 64, 78]
    assert Judge(0).decide_alone(76).code == 76
