"""Damage ticket files and kill their writer: ``python -m tests.campaigns.ticket_damage``.

flips     random byte flips, cuts and appended bytes in real ticket files: each is detected, or the
          content equals what was saved
renamed   a pickle that is renamed to .safetensors is refused
kills     the writer is killed (SIGKILL) before and after each of its file operations, and at random
          moments while it writes larger tickets: the folder always lists only whole tickets, and the
          next writer finishes the work
readers   two processes list and read the folder while a run saves tickets and deletes old ones: all
          are whole
owners    two runs start together with one folder: one of them is refused and named

Exits with an error on the first thing that should not have happened. Needs ``os.fork``, but no GPU.
"""

from __future__ import annotations

import argparse
import functools
import io
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.support.samples import sample_provenance
from pipeline.command_line import local_path
from pipeline.errors import DataError, IntegrityError, WriteError
from pipeline.tickets.format import Ticket, decode, encode
from pipeline.tickets.store import Retention, TicketStore

MEMORY = Path("/dev/shm")
FILE_OPERATIONS = {
    "open",
    "link",
    "write",
    "flush",
    "close",
    "fsync",
    "fdopen",
    "rename",
    "replace",
    "unlink",
    "mkdir",
    "__exit__",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--flips", type=int, default=10_000, metavar="N", help="number of damaged copies (default: 10000)"
    )
    parser.add_argument(
        "--kills", type=int, default=200, metavar="N", help="number of kills at random moments (default: 200)"
    )
    parser.add_argument(
        "--saves",
        type=int,
        default=500,
        metavar="N",
        help="number of tickets to save while others read them (default: 500)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random choices (default: 0)")
    parser.add_argument(
        "tickets",
        type=local_path,
        nargs="*",
        metavar="FILE",
        help="ticket file to damage (default: small ones that are made here)",
    )
    given = parser.parse_args()
    logging.disable(logging.WARNING)  # otherwise every damaged file would be named
    torch.set_num_threads(1)
    files = [path.read_bytes() for path in given.tickets] or [encode(small_ticket(index)) for index in range(3)]
    print(f"flips    {damage(files, num=given.flips, seed=given.seed)}", flush=True)
    refuse_pickle()
    print("renamed  a pickle renamed to .safetensors is refused", flush=True)
    print(f"kills    {kill_at_every_operation()}", flush=True)
    print(f"kills    {kill_at_random(num=given.kills, seed=given.seed)}", flush=True)
    print(f"readers  {read_while_writing(num=given.saves)}", flush=True)
    race_for_the_folder()
    print(
        "owners   of two runs that start together, one gets the folder, and the other is refused and named", flush=True
    )


@functools.cache  # made once, before any child is forked
def small_ticket(index: int, *, num_weights: int = 2000) -> Ticket:
    """Make a ticket of a linear layer at density 0.25, its bias and a buffer."""
    generator = torch.Generator().manual_seed(index)
    mask = torch.rand(num_weights, 4, generator=generator) < 0.25
    state = {
        "fc.weight": torch.randn(num_weights, 4, generator=generator) * mask,
        "fc.bias": torch.randn(num_weights, generator=generator),
        "running_mean": torch.zeros(3),
    }
    return Ticket(
        sample_provenance(index=index, num_classes=4), state, {"fc.weight": mask}, frozenset({"running_mean"})
    )


# -- damage


def damage(files: list[bytes], *, num: int, seed: int) -> str:
    """Damage copies at random and read them; returns a summary.

    Raises:
        AssertionError: if a damaged file is read as something else.
    """
    draw = random.Random(seed)
    whole = [decode(content) for content in files]
    found: dict[str, int] = {"detected": 0, "harmless": 0}
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        copy = Path(folder, "ticket-000.safetensors")  # real files, but in memory: a disk would only be slower
        for _ in range(num):
            which = draw.randrange(len(files))
            copy.write_bytes(_damaged(files[which], draw))
            try:
                read = decode(copy)
            except IntegrityError:
                found["detected"] += 1
                continue
            require_equal(read, whole[which])
            found["harmless"] += 1
    return (
        f"{num} damaged copies of {len(files)} files: {found['detected']} detected, "
        f"{found['harmless']} harmless (equal content)"
    )


def _damaged(content: bytes, draw: random.Random) -> bytes:
    """Return a damaged copy: bytes are changed, the end is cut off, or bytes are appended.

    Half of the changed bytes are in the header, which is small.
    """
    kind = draw.choices(("flip", "cut", "append"), (8, 3, 1))[0]
    if kind == "cut":
        return content[: draw.randrange(len(content))]
    if kind == "append":
        return content + draw.randbytes(draw.randint(1, 64))
    damaged = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        damaged[draw.randrange(header if draw.random() < 0.5 else len(content))] = draw.randrange(256)
    return bytes(damaged)


def require_equal(one: Ticket, other: Ticket) -> None:
    """Raise AssertionError unless the tickets are equal bit for bit."""
    assert one.provenance == other.provenance and one.buffers == other.buffers and list(one.state) == list(other.state)
    for name, tensor in one.state.items():
        assert tensor.dtype == other.state[name].dtype and torch.equal(tensor, other.state[name]), name
    assert one.masks.keys() == other.masks.keys() and all(
        torch.equal(mask, other.masks[name]) for name, mask in one.masks.items()
    )


def refuse_pickle() -> None:
    """Offer a checkpoint of ``torch.save`` under a ticket's name; it must be refused."""
    content = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, content)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ticket-000.safetensors")
        path.write_bytes(content.getvalue())
        try:
            decode(path)
        except IntegrityError:
            assert TicketStore(folder).list() == []
            return
    raise AssertionError("a pickle was read as a ticket")


# -- kills


def kill_at_every_operation() -> str:
    """Kill the writer before and after each of its file operations in turn, until one run finishes.

    It writes two tickets and keeps both; in a second campaign it keeps only the last.
    """
    counts = [_kill_at_every_operation(keep) for keep in (2, 1)]
    killed = f"{sum(counts)} times, {counts[1]} of a writer that retires tickets"
    return f"killed before and after every file operation, {killed}: only whole ones"


def _kill_at_every_operation(keep: int) -> int:
    """Kill the writer at every operation; returns the number of kills."""
    with tempfile.TemporaryDirectory() as root:
        for operation in range(10_000):
            folder = Path(root, str(operation))
            if not _killed(
                lambda folder=folder: _write_all(folder, 2, num_weights=200, keep=keep), operation=operation
            ):  # type: ignore[misc]
                return operation
            _require_whole(folder, 2, num_weights=200, keep=keep)
    raise AssertionError("the writer never ended")


def kill_at_random(*, num: int, seed: int) -> str:
    """Kill the writer of six tickets of 1 MB at random moments."""
    draw = random.Random(seed)
    num_weights, counts = 200_000, [0] * 7
    with tempfile.TemporaryDirectory() as root:
        for index in range(6):
            small_ticket(index, num_weights=num_weights)
        started = time.perf_counter()
        _killed(lambda: _write_all(Path(root, "once"), 6, num_weights=num_weights))
        seconds = time.perf_counter() - started
        for attempt in range(num):
            folder = Path(root, str(attempt))
            _killed(
                lambda folder=folder: _write_all(folder, 6, num_weights=num_weights),
                after_seconds=draw.uniform(0, seconds),
            )  # type: ignore[misc]
            counts[_require_whole(folder, 6, num_weights=num_weights, finish=attempt % 10 == 0)] += 1
    return f"killed at {num} random moments of {seconds:.2f} s: only whole tickets; {counts} times 0 to 6 of them"


def _write_all(folder: Path, num: int, *, num_weights: int, keep: int | None = None) -> None:
    """Claim the folder and save ``num`` tickets, as a run does; keep all, or the last ``keep``."""
    with TicketStore(folder, owner="run", retention=Retention(last=keep or num, first=False)) as store:
        for index in range(num):
            store.save(small_ticket(index, num_weights=num_weights))


def _require_whole(folder: Path, num: int, *, num_weights: int, finish: bool = True, keep: int | None = None) -> int:
    """Require that the folder holds the first tickets of the run, all of them whole.

    With ``keep``, they must be consecutive, and at most one more than ``keep``. With ``finish``, a
    resumed run then saves the rest.

    Returns:
        The number of tickets.
    """
    num_there, num_kept = 0, keep or num
    if folder.is_dir():
        names = [path for path in folder.glob("*.safetensors") if not path.name.startswith(".")]
        refs = TicketStore(folder).list()
        first = refs[0].index if refs and keep else 0
        assert [ref.index for ref in refs] == list(range(first, first + len(names))), "a ticket is missing or damaged"
        assert len(refs) <= num_kept + 1, "a ticket that was due to go is there"
        for ref in refs:
            require_equal(decode(ref.path), small_ticket(ref.index, num_weights=num_weights))
        num_there = len(refs)
    if finish:
        _write_all(folder, num, num_weights=num_weights, keep=keep)
        assert [ref.index for ref in TicketStore(folder).list()] == list(range(num - num_kept, num))
        assert not list(folder.glob(".ticket*")), "half a ticket is left over"
    return num_there


def _killed(work: Callable[[], None], *, operation: int | None = None, after_seconds: float | None = None) -> bool:
    """Run ``work`` in a child that is killed at a file operation, by number, or after a time.

    Returns:
        False if it ended before.
    """
    child = os.fork()
    if child == 0:
        try:
            if operation is not None:
                sys.setprofile(_kill_at(operation))
            work()
        except BaseException:
            os._exit(3)
        os._exit(0)
    if after_seconds is not None:
        time.sleep(after_seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, "the writer failed"
    return os.WIFSIGNALED(status)


def _kill_at(operation: int) -> Callable[[FrameType, str, Any], None]:
    """Return a profile function that kills the process at a file operation.

    Built-in functions that work on files are counted when they are called and when they return.
    """
    count = 0

    def profile(_frame: FrameType, event: str, called: Any) -> None:
        nonlocal count
        if event in ("c_call", "c_return") and getattr(called, "__name__", "") in FILE_OPERATIONS:
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    return profile


# -- readers and other runs


def read_while_writing(*, num: int, num_readers: int = 2) -> str:
    """Read while a run saves ``num`` tickets and keeps the last three; returns a summary.

    Raises:
        AssertionError: if a reader saw an incomplete ticket.
    """
    for index in range(num):
        small_ticket(index)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "t")
        store = TicketStore(folder, owner="run", retention=Retention(last=3, first=False))
        counts = [Path(root, f"reader-{i}") for i in range(num_readers)]
        readers = []
        for path in counts:
            readers.append(os.fork())
            if readers[-1] == 0:
                os._exit(_read_until_done(folder, done=Path(root, "done"), counts=path))
        for index in range(num):
            store.save(small_ticket(index))
        Path(root, "done").touch()
        codes = [os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) for reader in readers]
        assert codes == [0] * num_readers, "a reader saw something else than whole tickets"
        listings, tickets, gone = (
            sum(column) for column in zip(*(map(int, path.read_text().split()) for path in counts), strict=True)
        )
    seen = (
        f"{num_readers} readers listed the folder {listings} times and read {tickets} tickets, all whole "
        f"({gone} were deleted before they were read)"
    )
    return f"{num} tickets saved and retired meanwhile: {seen}"


def _read_until_done(folder: Path, *, done: Path, counts: Path) -> int:
    """List and read tickets until ``done`` exists, and write the counts to ``counts``.

    Returns:
        The exit code: 3 for a file that is not a whole ticket, or is the wrong one.
    """
    listings = tickets = gone = 0
    try:
        is_last = False
        while not is_last:
            is_last = done.exists()
            indices = [ref.index for ref in TicketStore(folder).list()]
            assert indices == sorted(set(indices))
            listings += 1
            for path in folder.glob("*.safetensors"):
                try:
                    ticket = decode(path)
                except DataError:  # the file was deleted
                    gone += 1
                    continue
                require_equal(ticket, small_ticket(ticket.provenance.index))
                tickets += 1
    except BaseException:
        return 3
    counts.write_text(f"{listings} {tickets} {gone}")
    return 0


def race_for_the_folder() -> None:
    """Let two runs open the folder at once; the loser's error names the winner, which continues."""
    with tempfile.TemporaryDirectory() as root:
        start = time.monotonic() + 0.1
        children = {owner: os.fork() for owner in ("run-1",)}
        if children["run-1"] == 0:
            os._exit(_claim(Path(root, "t"), "run-1", start))
        code = _claim(Path(root, "t"), "run-2", start)
        other = os.waitstatus_to_exitcode(os.waitpid(children["run-1"], 0)[1])
        assert sorted((code, other)) == [0, WriteError.code], (code, other)
        winner = "run-2" if code == 0 else "run-1"
        TicketStore(Path(root, "t"), owner=winner).save(small_ticket(0))  # as after a resume


def _claim(folder: Path, owner: str, start: float) -> int:
    while time.monotonic() < start:
        pass
    try:
        TicketStore(folder, owner=owner)
    except WriteError as error:
        return error.code if "belonged to run 'run-" in error.what else 3
    return 0


if __name__ == "__main__":
    main()
