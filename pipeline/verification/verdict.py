"""Verify a run, a bundle or an entry of the zoo, and say in one line what was found."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import zoo
from pipeline.chain import CHECKPOINT, TICKET
from pipeline.config.load import config_of, differences
from pipeline.config.schema import Config
from pipeline.datasets.sets import inspect
from pipeline.errors import ConfigError, DataError, IntegrityError
from pipeline.training import run_record
from pipeline.verification.bundle import MANIFEST, check_manifest, unpacked
from pipeline.verification.checks import check_all
from pipeline.verification.claims import Claims, as_values, read_claims
from pipeline.verification.segments import SAME_DATA, Rerun, Segment, draw, rerun, segments_of
from pipeline.verification.tolerance import outside

logger = logging.getLogger(__name__)

# The first word of the verdict, by what was shown.
EQUAL, NEAR, CONSISTENT = "VERIFIED", "VERIFIED WITHIN TOLERANCE", "CONSISTENT"


@dataclass(frozen=True)
class Opened:
    """What is to be verified: a folder, and what messages call it."""

    folder: Path
    name: str
    manifest: str = ""  # sha256 of the manifest of a bundle; empty: it is a run's folder


@contextlib.contextmanager
def opened(target: str) -> Iterator[Opened]:
    """Open a run's folder, a bundle (a file, or a folder into which it was unpacked) or an entry of the zoo.

    Raises:
        ConfigError: it is none of these.
        IntegrityError: a bundle is damaged.
    """
    path = Path(target)
    if not path.exists():
        path = zoo.find(target)
    if path.is_dir():
        if (path / MANIFEST).exists():
            yield Opened(path, target, check_manifest(path, target))
        elif (path / run_record.NAME).exists():
            yield Opened(path, target)
        else:
            do = "pass the output_dir of a run, or a bundle"
            raise ConfigError(f"{target}: is not the folder of a run: it has no {run_record.NAME}", do=do)
        return
    with unpacked(path) as folder:
        yield Opened(folder, target, check_manifest(folder, target))


def verify(target: str, *, num_segments: int, seed: int, overrides: Sequence[str] = ()) -> str:
    """Verify what ``target`` names, and return the verdict: one line.

    Args:
        target: see :func:`opened`.
        num_segments: how many segments to draw and run again, at most all.
        seed: of the draw.
        overrides: ``key=value`` settings of this machine, such as where the data sets are.

    Raises:
        IntegrityError: something does not agree.
        RunError: something is missing, invalid or cannot be read.
    """
    with opened(target) as source:
        claims = read_claims(source.folder, source.name)
        config = _config_here(claims, overrides)
        check_all(claims)
        _check_data(claims, config, is_needed=num_segments > 0)
        logger.info("%s: %s agree with each other", source.name, _contents(claims))
        for note in claims.notes:
            logger.info("note: %s", note)
        if source.manifest:
            logger.info("sha256 of the bundle's manifest: %s", source.manifest)
        segments = segments_of(claims) if num_segments else []
        possible = _possible(claims, segments) if num_segments else []
        drawn = draw(possible, num_segments, seed=seed, link=claims.records[-1]["link"])
        results = []
        for segment in drawn:
            logger.info("running %s again on %s", segment.name, _ranks(claims, segment))
            results.append(_judged(claims, segment, config, overrides))
        return _verdict(claims, results, num_possible=len(possible), num_all=len(segments), seed=seed)


def _config_here(claims: Claims, overrides: Sequence[str]) -> Config:
    """Return the configuration with the settings of this machine."""
    if not overrides:
        return claims.config
    config = config_of("config.yaml", as_values(claims.config), overrides)
    if changed := differences(as_values(claims.config), as_values(config)):
        raise ConfigError(
            f"{changed[0]}: changes what is computed", do="override only where data is and how it is loaded"
        )
    return config


def _check_data(claims: Claims, config: Config, *, is_needed: bool) -> None:
    """Compare the data sets that are here with the digests in the chain."""
    digests = claims.start_at(len(claims.records))["data"]
    paths = {"val": config.data.val}
    if config.data.order == "random":  # the digest of another order covers more than the images
        paths["train"] = config.data.train
    for use, text in sorted(paths.items()):
        if not Path(text).exists():
            if is_needed:
                raise DataError(f"data.{use}: {text} does not exist, so no segment can be run again", do=SAME_DATA)
            claims.notes.append(f"data.{use} is not here ({text}), so its digest was not compared")
        elif (found := inspect(text, level=0).digest) != digests[use]:
            raise DataError(
                f"data.{use}: {text} has digest {found[:12]}…, the run had {str(digests[use])[:12]}…", do=SAME_DATA
            )


def _contents(claims: Claims) -> str:
    """Say what was checked."""
    counts = {"tickets": len(claims.of_kind(TICKET)), "checkpoints": len(claims.checkpoints)}
    parts = [f"{len(claims.records)} records of the chain", *(f"{number} {what}" for what, number in counts.items())]
    return ", ".join([*parts, "the report"] if claims.is_ended else parts)


def _possible(claims: Claims, segments: Sequence[Segment]) -> list[Segment]:
    """Return the segments that can be run again; the others are reported.

    Raises:
        DataError: there is none.
    """
    for segment in segments:
        if segment.reason:
            logger.warning("%s cannot be run again: %s", segment.name, segment.reason)
    possible = [segment for segment in segments if not segment.reason]
    if not possible:
        num = len(claims.of_kind(CHECKPOINT))
        raise DataError(
            f"{claims.name}: has no segment that can be run again ({num} checkpoints in the chain, "
            f"{len(claims.checkpoints)} here)",
            do="pass --segments 0 to check without running anything; checkpoint.keep_every keeps the starts",
        )
    return possible


def _ranks(claims: Claims, segment: Segment) -> str:
    ranks = int(claims.start_at(segment.num_before or 1)["ranks"])
    return f"{ranks} ranks" if ranks > 1 else "one rank"


def _judged(claims: Claims, segment: Segment, config: Config, overrides: Sequence[str]) -> Rerun:
    """Run a segment again and compare it.

    Raises:
        IntegrityError: it differs, and not by what another machine may change.
    """
    with tempfile.TemporaryDirectory(prefix="ticketworks-verify-") as name:
        found = rerun(claims, segment, Path(name), overrides=overrides)
        if found.is_equal:
            logger.info("%s: every digest, ticket and number is equal", segment.name)
            return found
        if not found.environment:
            raise IntegrityError(
                f"{claims.name}: {segment.name}, run again: {found.difference}",
                do="do not trust this run: processor, versions and threads are those that it states",
            )
        logger.info("%s: bits cannot be equal here: %s", segment.name, _changes(found))
        problem, compared = outside(claims, found, config)
        if problem:
            raise IntegrityError(
                f"{claims.name}: {segment.name}, run again: {problem}",
                do=f"verify it on the processor and the versions of the run; here they differ ({_changes(found)})",
            )
        logger.info("%s: within tolerance: %s", segment.name, compared)
        return found


def _changes(found: Rerun) -> str:
    return "; ".join(f"{key} {change}" for key, change in found.environment.items())


def _verdict(claims: Claims, results: Sequence[Rerun], *, num_possible: int, num_all: int, seed: int) -> str:
    """Return the one line."""
    if not results:
        return f"{CONSISTENT} {claims.name}: {_contents(claims)} agree; no segment was run again"
    num_equal = sum(found.is_equal for found in results)
    which = ", ".join(found.segment.name.removeprefix("steps ") for found in results)
    drawn = f"{len(results)} of {num_possible} segments run again (seed {seed}, steps {which})"
    more = f"; {num_all - num_possible} more cannot be run again" if num_possible < num_all else ""
    if num_equal == len(results):
        return f"{EQUAL} {claims.name}: {drawn} with equal bits{more}; {_contents(claims)} agree"
    drawn += f", {num_equal} with equal bits, the others within tolerance"
    return f"{NEAR} {claims.name}: {drawn}{more}; {_contents(claims)} agree"
