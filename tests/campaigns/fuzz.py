"""Damage what is read from files at random: ``python -m tests.campaigns.fuzz``.

ticket      1,000,000 ticket files: changed bytes; changed headers with a new digest
config        100,000 configurations: files and overrides
beton         100,000 .beton files and sidecars: changed bytes; changed tables with a new hash
checkpoint    100,000 manifests and states of checkpoints: changed bytes; changed states with a new
              manifest

Each input must be refused by one of the project's own errors, or be read as it was written, or be
valid by an independent judge (``judges.py``). Anything else ends the campaign with the number of the
input and the seed, which reproduce it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.checkpoint.verify import find_damage, read_state
from pipeline.config import load as configuration
from pipeline.datasets.sidecar import verify
from pipeline.errors import RunError
from pipeline.plan import build_plan
from pipeline.tickets.verify import read_verified
from tests.campaigns import judges
from tests.campaigns.bad_configurations import OVERRIDES
from tests.campaigns.bad_saved import joined, parts
from tests.campaigns.cases import make_good
from tests.campaigns.materials import copy_beton, make_checkpoint, write_manifest
from tests.campaigns.mutate import damaged_bytes, damaged_text, damaged_tree
from tests.support.launch import ROOT

REFUSED, SAME, VALID = "refused", "unchanged", "changed and valid"
Try = Callable[[random.Random], str]  # reads one input, returns how it ended; AssertionError: it was wrongly accepted


@contextmanager
def tickets(folder: Path) -> Iterator[Try]:
    """Damage tickets; ``read_verified`` checks them, ``decode`` reads what it accepts."""
    from pipeline.tickets.format import decode

    good = make_good(folder / "good").ticket
    entries, header, body = parts(good)
    head = 8 + int.from_bytes(good[:8], "little")
    digest = header["content_sha256"]

    def attempt(draw: random.Random) -> str:
        is_signed = draw.random() < 0.3
        content = damaged_bytes(good, draw, head=head) if not is_signed else _signed(entries, header, body, draw)
        try:
            ticket = read_verified(content)
        except RunError:
            return REFUSED
        decode(content)
        assert is_signed or ticket.content_digest == digest, "another content"
        problem = judges.judge_ticket(content)
        assert not problem, problem
        return SAME if ticket.content_digest == digest else VALID

    yield attempt


def _signed(entries: dict[str, Any], header: dict[str, Any], body: bytes, draw: random.Random) -> bytes:
    """Change a header, an entry or a body of a ticket, and write a new digest where possible."""
    which = draw.randrange(4)
    if which == 0:
        header = header | {"provenance": damaged_tree(header["provenance"], draw)}
    elif which == 1:
        header = damaged_tree(header, draw)
    elif which == 2:
        entries = damaged_tree(entries, draw)
    else:
        body = damaged_bytes(body, draw)
    try:
        return joined(entries, header, body)
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
    ):  # the change left nothing that has a digest
        return damaged_bytes(joined({}, json.dumps(header), body), draw)


@contextmanager
def configs(folder: Path) -> Iterator[Try]:
    """Damage configurations.

    Sections of shipped files with changed lines, and one to three overrides of any key with any value.
    """
    sections = [
        section for path in sorted((ROOT / "configs").glob("*.yaml")) for section in _sections(path.read_text())
    ]
    keys = [key for key, _, _ in judges.leaves(configuration.config_of("seed", _minimal()), "")]
    odd = ("1", "0.5", "2 epochs", "true", "fp32", "~", "[]", "{}")
    values = tuple(dict.fromkeys([*(text.partition("=")[2] for text, _ in OVERRIDES), *odd]))
    path = folder / "fuzz.yaml"

    def attempt(draw: random.Random) -> str:
        text, overrides = "name: x", ["data.train=a", "data.val=b"]
        if draw.random() < 0.5:
            text = damaged_text("\n".join([text, *draw.sample(sections, 2)]), draw, words=values)
        else:
            overrides += [f"{draw.choice(keys)}={draw.choice(values)}" for _ in range(draw.choice((1, 1, 2, 3)))]
            if draw.random() < 0.3:
                overrides[-1] = damaged_bytes(overrides[-1].encode(), draw).decode(errors="replace")
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            config = configuration.load_config(str(path), overrides)
            build_plan(config, steps_per_epoch=100)
        except RunError:
            return REFUSED
        problem = judges.judge_config(config)
        assert not problem, problem
        if draw.random() < 0.2:
            path.write_text(configuration.to_yaml(config))
            assert configuration.load_config(str(path)) == config, "what is printed is not what was read"
        return VALID

    yield attempt


def _sections(text: str) -> list[str]:
    """Split a file into its top-level entries, each with what is below it."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(("#", "name:", "base:"))]
    starts = [index for index, line in enumerate(lines) if not line.startswith(" ")]
    return ["\n".join(lines[start:end]) for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]


def _minimal() -> dict[str, Any]:
    return {"name": "x", "data": {"train": "a", "val": "b"}}


@contextmanager
def betons(folder: Path) -> Iterator[Try]:
    """Damage files in place and undo it: copying 4 MiB per input would take most of the time."""
    good = make_good(folder / "good")
    path = copy_beton(good.beton, folder / "fuzz.beton")
    content, sidecar_bytes = path.read_bytes(), Path(f"{path}.json").read_bytes()
    sidecar = json.loads(sidecar_bytes)
    tables_end = 24 + 2 * 1041 + 24 * sidecar["num_samples"]
    page_start, page_end = sidecar["page_size"], 2 * sidecar["page_size"]
    filled = page_start + 12000
    known = verify(path, level=2)
    places = [(0, tables_end), (0, 24), (2106, tables_end), (page_start, filled), (page_end, len(content))]

    def attempt(draw: random.Random) -> str:
        kind = draw.randrange(10)
        is_signed = kind >= 7
        start, end = draw.choice(places)
        new_sidecar, size = sidecar_bytes, len(content)
        changed = content[start:end]
        if kind < 3:
            tree = draw.random() < 0.5
            new_sidecar = _json(damaged_tree(sidecar, draw)) if tree else damaged_bytes(sidecar_bytes, draw)
        elif kind == 3:
            size = draw.choice(
                (draw.randrange(len(content)), draw.randrange(tables_end), len(content) - draw.randrange(1, 300))
            )
        else:
            changed = damaged_bytes(changed, draw)[: end - start].ljust(end - start, b"\0")
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), changed, start)
            os.ftruncate(file.fileno(), size)
            if is_signed:
                sha = hashlib.sha256(os.pread(file.fileno(), page_start, 0))
                sha.update(os.pread(file.fileno(), len(content), page_end))
                new_sidecar = json.dumps(sidecar | {"tables_sha256": sha.hexdigest()}).encode()
            Path(f"{path}.json").write_bytes(new_sidecar)
            try:
                level = draw.choice((0, 1, 2)) if not is_signed else draw.choice((1, 2))
                info = verify(path, level=level)
                if is_signed or level:
                    problem = judges.judge_beton(path, info.num_classes)
                    assert not problem, f"level {level}: {problem}"
                assert is_signed or size == len(content), "another size"
                assert (info.classes, info.num_samples) == (known.classes, known.num_samples), (
                    f"level {level}: another content"
                )
                if level == 2 and not is_signed:
                    assert info.digest == known.digest and os.pread(file.fileno(), len(content), 0) == content, (
                        "another content at level 2"
                    )
                return SAME if changed == content[start:end] else VALID
            except RunError:
                return REFUSED
            finally:
                os.ftruncate(file.fileno(), min(size, start))
                os.pwrite(file.fileno(), content[min(size, start) :], min(size, start))

    yield attempt


def _json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


@contextmanager
def checkpoints(folder: Path) -> Iterator[Try]:
    target = folder / "step-00000040"
    make_checkpoint(target)
    good = {path.name: path.read_bytes() for path in target.iterdir()}
    state, manifest = json.loads(good["state.json"]), json.loads(good["manifest.json"])

    def attempt(draw: random.Random) -> str:
        kind = draw.randrange(8)
        name = draw.choice(("manifest.json", "manifest.json", "state.json", "state.safetensors", "rank-1.safetensors"))
        if kind < 4:
            (target / name).write_bytes(damaged_bytes(good[name], draw))
        elif kind < 6:
            name = "state.json"
            text = _json(damaged_tree(state, draw)) if draw.random() < 0.7 else damaged_bytes(good[name], draw)
            (target / name).write_bytes(text)
            write_manifest(target)
        elif kind == 6:
            name = "manifest.json"
            (target / name).write_bytes(_json(damaged_tree(manifest, draw)))
        else:
            (target / name).unlink()
            with contextlib.suppress(FileExistsError):
                draw.choice((os.mkdir, os.mkfifo, functools.partial(os.symlink, "/dev/zero"), lambda _: None))(
                    target / name
                )
        try:
            if find_damage(target):
                return REFUSED
            read_state(target)  # cannot raise for anything that find_damage did not find
            problem = judges.judge_checkpoint(target)
            assert not problem, problem
            return SAME if (target / name).read_bytes() == good[name] else VALID
        finally:
            for each in {name, "manifest.json"}:
                if (target / each).is_dir():
                    (target / each).rmdir()
                elif (target / each).is_fifo() or (target / each).is_symlink():
                    (target / each).unlink()
                (target / each).write_bytes(good[each])

    yield attempt


TARGETS: dict[str, tuple[Callable[[Path], contextlib.AbstractContextManager[Try]], int]] = {
    "ticket": (tickets, 1_000_000),
    "config": (configs, 100_000),
    "beton": (betons, 100_000),
    "checkpoint": (checkpoints, 100_000),
}


def run(target: str, *, count: int, seed: int, folder: Path) -> dict[str, int]:
    """Count how the inputs ended; raises with the number of the first that was wrongly accepted."""
    ends = {REFUSED: 0, SAME: 0, VALID: 0}
    with TARGETS[target][0](folder) as attempt:
        for number in range(count):
            try:
                ends[attempt(random.Random(f"{seed} {target} {number}"))] += 1
            except Exception as error:
                error.add_note(f"target {target}, seed {seed}, input {number}")
                raise
    return ends


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target",
        choices=TARGETS,
        action="append",
        help="kind of file to damage; may be repeated (default: all kinds)",
    )
    parser.add_argument("--count", type=int, metavar="N", help="number of inputs per target (default: as listed above)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the damage (default: 0)")
    given = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    for target in given.target or TARGETS:
        count = given.count or TARGETS[target][1]
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            ends = run(target, count=count, seed=given.seed, folder=Path(folder))
        told = ", ".join(f"{num:,} {how}" for how, num in ends.items())
        print(f"{target:11} {count:,} inputs: {told}, nothing else; {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
