"""A short version of ``python -m tests.campaigns.ticket_damage``."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from pipeline.tickets.format import encode
from tests.campaigns import ticket_damage


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_random_damage_is_detected_or_harmless() -> None:
    files = [encode(ticket_damage.small_ticket(index, num_weights=300)) for index in range(2)]
    summary = ticket_damage.damage(files, num=1000, seed=1)
    counts = re.findall(r"(\d+) (?:detected|harmless)", summary)
    assert sum(map(int, counts)) == 1000 and int(counts[0]) > 980, summary


def test_a_pickle_under_a_tickets_name() -> None:
    ticket_damage.refuse_pickle()


def test_the_writer_is_killed_at_every_file_operation() -> None:
    summary = ticket_damage.kill_at_every_operation()
    times = re.search(r"(\d+) times, (\d+) of a writer that retires", summary)
    assert times is not None, summary
    keeping, retiring = int(times[1]) - int(times[2]), int(times[2])
    assert keeping > 40, summary  # open, write, flush, fsync, replace, … of a claim and two tickets
    assert retiring >= keeping + 8, summary  # unlink, and open, fsync, close of the folder: before and after each


def test_the_writer_is_killed_at_random_moments() -> None:
    assert "killed at 15 random moments" in ticket_damage.kill_at_random(num=15, seed=1)


def test_readers_beside_a_writer_see_whole_tickets_only() -> None:
    summary = ticket_damage.read_while_writing(num=40)
    counts = re.search(r"listed the folder (\d+) times and read (\d+) tickets, all whole", summary)
    assert counts is not None and int(counts[1]) >= 2 and int(counts[2]) >= 6, (
        summary
    )  # the last listing of each sees the last three


def test_two_runs_that_start_together() -> None:
    ticket_damage.race_for_the_folder()
