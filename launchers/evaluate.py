"""Judge tickets, long after training and without its configuration: each alone, superposed, and as ensembles.

    python launchers/evaluate.py --tickets runs/a/tickets --data val.beton --recalibrate train.beton --output judged
    torchrun --nproc-per-node 8 launchers/evaluate.py --tickets runs/*/tickets --data val.beton --corrupted c/ --output judged

deepspeed starts it as well. The order of folders, and of the tickets' indices in each, is the order of the ensembles.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launchers import cli
from launchers.environment import check_environment
from pipeline.command_line import ArgumentParser, leave
from pipeline.errors import DataError, WriteError
from pipeline.files import require_writable
from pipeline.redaction import redact

if TYPE_CHECKING:
    from pipeline.data.loaders import EvalLoader
    from pipeline.evaluation.opening import Sets
    from pipeline.evaluation.report import Report
    from pipeline.evaluation.runs import TicketRun
    from pipeline.schema import Config

logger = logging.getLogger("launchers.evaluate")  # also when this file is the script


def evaluate(config: Config, runs: Sequence[TicketRun], sets: Sets, given: argparse.Namespace) -> Report | None:
    """Everything that was asked for, all ranks together. Returns the report on rank 0, None on the other ranks."""
    from pipeline import assembly, tracking
    from pipeline.data.loaders import open_eval_loader, open_train_loader
    from pipeline.distributed import session
    from pipeline.distributed.engine import autocast_dtype
    from pipeline.evaluation.attacks import Attack
    from pipeline.evaluation.publish import publish
    from pipeline.evaluation.report import FurtherSets, evaluate_tickets

    with assembly.open_session(config):
        data, device, channels_last = config.data, session.device(), config.train.channels_last

        @functools.cache
        def loader_of(eval_ratio: float) -> EvalLoader:
            """One for each crop: it is turned to set after set, where another would be compiled anew."""
            cropping = dataclasses.replace(data, eval_ratio=eval_ratio)
            return open_eval_loader(Path(data.val), cropping, batch=config.evaluation.batch, device=device, channels_last=channels_last)

        loader = loader_of(data.eval_ratio)
        trained_on = None
        if sets.recalibration is not None:
            ranks = session.world_size()
            trained_on = open_train_loader(data, global_batch=ranks, seed=config.seed, device=device, channels_last=channels_last)
        strength = {"epsilon": given.epsilon, "num_steps": given.pgd_steps, "num_images": given.adversarial_images}
        attack = Attack.of(data.mean, data.std, device=device, **strength)
        result = evaluate_tickets(
            runs,
            config.evaluation,
            build_model=lambda ticket: assembly.network_for(ticket, config),
            eval_loader=loader,
            train_loader=trained_on,
            flops_ratio=lambda provenance, masks: assembly.flops_ratio(provenance, masks, config),
            held_out=None if trained_on is None else assembly.open_held_out(config),
            autocast_dtype=autocast_dtype(config.train),
            further=FurtherSets(
                corrupted=corrupted_sets(sets, loader_of, eval_ratio=data.eval_ratio),
                other_classes=((name, turned(loader, path)) for name, path in sets.other_classes.items()),
                attack=attack if given.adversarial else None,
                flip=given.flip or config.evaluation.flip,
                fits_temperature=given.temperature,
            ),
        )

        def publish_result() -> None:
            assert result is not None
            with tracking.open_tracker(
                config.tracking, output_dir=given.output, run_name=config.tracking.run_name or config.name
            ) as tracker:
                settings = described(config, sets, given) | {"ranks": session.world_size()}
                tracker.log_params(settings)
                publish(result, given.output, tracker, runs=runs, settings=settings)
            assembly.say_where_tracked(config.tracking, given.output)

        session.on_main(publish_result)
        return result


def corrupted_sets(sets: Sets, loader_of: Callable[[float], EvalLoader], *, eval_ratio: float) -> Iterator[tuple[str, int, EvalLoader]]:
    """(corruption, severity, loader), each in its turn. Images that were cropped when they were made are not cropped again."""
    for (name, severity), path in sets.corrupted.items():
        yield name, severity, turned(loader_of(1.0 if path in sets.cropped else eval_ratio), path)


def turned(loader: EvalLoader, path: Path) -> EvalLoader:
    """The loader, turned to a file."""
    logger.info("evaluating %s", path)
    loader.turn_to(path)
    return loader


def described(config: Config, sets: Sets, given: argparse.Namespace) -> dict[str, object]:
    """What was evaluated how, for people."""
    data = config.data
    return {
        "tickets": " ".join(map(redact, given.tickets)),
        "data": f"{sets.data.path}, {sets.data.num_samples:,} images, digest {sets.data.digest[:16]}",
        "recalibration": "none: no superposition" if sets.recalibration is None else str(sets.recalibration.path),
        "superposition": f"{config.evaluation.superposition}, pruned back by {config.evaluation.prune_scope} magnitude"
        + (f", chosen with {config.evaluation.held_out}" if config.evaluation.held_out else ""),
        "image": f"{data.eval_resolution} pixels, the central {data.eval_ratio:g} of the shorter side, mean {data.mean}, std {data.std}",
        "corrupted": f"{len({name for name, _ in sets.corrupted})} corruptions, {len(sets.corrupted)} sets of {given.corrupted}"
        + (f", {len(sets.cropped)} of them cropped already and not again" if sets.cropped else "")
        if sets.corrupted
        else "none",
        "other classes": " ".join(map(str, given.ood)) or "none",
        "attacks": f"FGSM and {given.pgd_steps} steps of PGD, epsilon {given.epsilon:g}/255, white-box, on "
        + (f"{given.adversarial_images:,} images, evenly spread" if given.adversarial_images else "all images")
        if given.adversarial
        else "none",
        "test-time flip": given.flip or config.evaluation.flip,
        "precision": config.train.precision,
    }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of launchers/evaluate.py."""
    parser = ArgumentParser(prog="launchers/evaluate.py", allow_abbrev=False, description="Evaluate tickets, superposition and ensembles.")
    add = parser.add_argument
    add(
        "--tickets",
        nargs="+",
        required=True,
        metavar="DIR",
        help="folders of tickets, or URLs that fsspec knows, one per run; a dense run is the reference",
    )
    add("--data", type=Path, required=True, metavar="FILE", help="the .beton file to evaluate on")
    add("--output", type=Path, required=True, metavar="DIR", help="where table, JSON, figures, page and superposed networks go")
    add("--recalibrate", type=Path, metavar="FILE", help="the training .beton: superpose every run and recalibrate BatchNorm on it")
    add("--corrupted", type=Path, metavar="DIR", help="corrupted copies <corruption>-<severity>.beton (python -m data_prep corrupt)")
    add("--ood", type=Path, nargs="+", default=[], metavar="FILE", help=".beton files of images of none of the classes")
    add("--adversarial", action="store_true", help="accuracy under FGSM and PGD")
    add("--adversarial-images", type=_count, metavar="N", help="attack only N of the images, evenly spread: PGD is slow; default all")
    add("--epsilon", type=_positive, default=8.0, metavar="N", help="how far a pixel may move, of 255 (default 8)")
    add("--pgd-steps", type=_count, default=10, metavar="N", help="default 10")
    add("--flip", action="store_true", help="average the predictions for each image and its mirror image")
    add("--temperature", action="store_true", help="also NLL and ECE after temperature scaling, fitted on the other half of the images")
    add("--use", choices=("all", "last"), default="all", help="of every run all tickets, or the last one (DST ensembles); default all")
    add("--other-class-list", action="store_true", help="accept a set whose classes have other names than those of training")
    add("--overwrite", action="store_true", help="replace a report that is there")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    help_overrides = "settings: data.num_workers, data.eval_resolution, evaluation.*, train.precision, train.threads_per_rank, tracking.*"
    add("overrides", nargs="*", default=[], metavar="key=value", help=help_overrides)
    return parser.parse_args(_overrides_last(argv))


def main(argv: Sequence[str]) -> int:
    """Parse, check, evaluate; returns the exit code."""
    with cli.ending() as end:
        given = parse(argv)
        check_environment()
        cli.log_to_terminal()
        _check_paths(given)
        end.output_dir = given.output
        from pipeline.config import check_overrides

        check_overrides(given.overrides)
        from pipeline.evaluation import opening

        opening.check_settings(given.overrides)
        sets = opening.open_sets(given.data, recalibration=given.recalibrate, corrupted=given.corrupted, other_classes=given.ood)
        from pipeline.tickets.remote import fetched

        with fetched(given.tickets) as folders:
            runs = opening.open_runs(folders, use=given.use)
            opening.check_classes(runs, sets, may_differ=given.other_class_list)
            evaluate(opening.configure(runs, sets, output=given.output, overrides=given.overrides), runs, sets, given)
    return end.code


def _overrides_last(argv: Sequence[str]) -> list[str]:
    """``key=value`` arguments behind all options: an option that takes several files would swallow those that follow it."""
    overrides = [text for text in argv if "=" in text and not text.startswith("-") and not Path(text).exists()]
    return [text for text in argv if text not in overrides] + (["--", *overrides] if overrides else [])


def _check_paths(given: argparse.Namespace) -> None:
    for folder in given.tickets:
        if "://" not in folder and not Path(folder).is_dir():
            raise DataError(f"--tickets {folder}: no such folder", do="name folders of tickets")
    for path in filter(None, (given.data, given.recalibrate, *given.ood)):
        if not path.exists():
            raise DataError(f"{path}: does not exist", do="check the path, or write the data set with python -m data_prep")
    require_writable(given.output)
    if (given.output / "report.json").exists() and not given.overwrite:
        raise WriteError(f"{given.output}: already holds a report", do="choose another --output, or add --overwrite")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 255:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0, at most 255")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10**9:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
