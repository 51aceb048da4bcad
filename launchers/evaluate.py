"""Evaluate tickets at any time after training, without its configuration: alone, superposed and as ensembles.

Under any launcher::

    python launchers/evaluate.py --tickets runs/a/tickets --data val.beton \
        --recalibrate train.beton --output judged
    torchrun --nproc-per-node 8 launchers/evaluate.py --tickets runs/*/tickets \
        --data val.beton --corrupted c/ --output judged

Ensembles grow in the order of the folders and, within a folder, in the order of the tickets' indices.
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

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.data.loaders import EvalLoader
    from pipeline.datasets.sets import DataSets
    from pipeline.evaluation.report import Report
    from pipeline.evaluation.runs import TicketRun

logger = logging.getLogger("launchers.evaluate")  # also when this file is the script


def evaluate(config: Config, runs: Sequence[TicketRun], sets: DataSets, given: argparse.Namespace) -> Report | None:
    """Evaluate everything that was asked for, on all ranks; return the report on rank 0, None on the others."""
    from pipeline import tracking
    from pipeline.data.loaders import open_eval_loader, open_train_loader
    from pipeline.distributed import session
    from pipeline.evaluation.attacks import Attack
    from pipeline.evaluation.networks import evaluation_setup
    from pipeline.evaluation.publish import publish, say_where_tracked
    from pipeline.evaluation.report import FurtherSets, evaluate_tickets
    from pipeline.training import assembly

    with assembly.open_session(config):
        data, device, channels_last = config.data, session.device(), config.train.channels_last

        @functools.cache
        def loader_of(eval_ratio: float) -> EvalLoader:
            """Open one loader for each crop and use it for every set, because compiling a loader takes time."""
            cropping = dataclasses.replace(data, eval_ratio=eval_ratio)
            return open_eval_loader(
                sets.val.path, cropping, batch=config.evaluation.batch, device=device, channels_last=channels_last
            )

        loader = loader_of(data.eval_ratio)
        trained_on = None
        if sets.train is not None:
            ranks = session.world_size()
            trained_on = open_train_loader(
                sets.train.path, data, global_batch=ranks, seed=config.seed, device=device, channels_last=channels_last
            )
        strength = {"epsilon": given.epsilon, "num_steps": given.pgd_steps, "num_images": given.adversarial_images}
        attack = Attack.of(data.mean, data.std, device=device, **strength)
        result = evaluate_tickets(
            runs,
            evaluation_setup(
                config,
                train_loader=trained_on,
                held_out=assembly.open_held_out_loader(config, sets),
                is_sparse=given.sparse,
            ),
            eval_loader=loader,
            further=FurtherSets(
                corrupted=corrupted_sets(sets, loader_of, eval_ratio=data.eval_ratio),
                other_classes=((name, switched(loader, path)) for name, path in sets.other_classes.items()),
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
                settings = settings_for_report(config, sets, given) | {"ranks": session.world_size()}
                tracker.log_params(settings)
                publish(result, given.output, tracker, runs=runs, settings=settings, data_digest=sets.val.digest)
            say_where_tracked(config.tracking, given.output)

        session.on_main(publish_result)
        return result


def corrupted_sets(
    sets: DataSets, loader_of: Callable[[float], EvalLoader], *, eval_ratio: float
) -> Iterator[tuple[str, int, EvalLoader]]:
    """Yield (corruption, severity, loader) for one set after the other.

    Images that were cropped when they were written are not cropped again.
    """
    for (name, severity), path in sets.corrupted.items():
        yield name, severity, switched(loader_of(1.0 if path in sets.cropped else eval_ratio), path)


def switched(loader: EvalLoader, path: Path) -> EvalLoader:
    """Switch the loader to the set at ``path`` and return it."""
    logger.info("evaluating %s", path)
    loader.switch_to(path)
    return loader


def settings_for_report(config: Config, sets: DataSets, given: argparse.Namespace) -> dict[str, object]:
    """Return what was evaluated and how, as rows for the report."""
    from pipeline.inference.timing import describe_processor
    from pipeline.redaction import redact

    data = config.data
    return {
        "tickets": " ".join(map(redact, given.tickets)),
        "data": f"{sets.val.path}, {sets.val.num_samples:,} images, digest {sets.val.digest[:16]}",
        "recalibration": "none: no superposition" if sets.train is None else str(sets.train.path),
        "superposition": f"{config.evaluation.superposition}, pruned back by {config.evaluation.prune_scope} magnitude"
        + (f", chosen with {config.evaluation.held_out}" if config.evaluation.held_out else ""),
        "image": f"{data.eval_resolution} pixels, the central {data.eval_ratio:g} of the shorter side, "
        f"resized as {data.eval_resize}, mean {data.mean}, std {data.std}",
        "corrupted": f"{len({name for name, _ in sets.corrupted})} corruptions, {len(sets.corrupted)} sets of "
        f"{given.corrupted}" + (f", {len(sets.cropped)} of them cropped already and not again" if sets.cropped else "")
        if sets.corrupted
        else "none",
        "other classes": " ".join(map(str, given.ood)) or "none",
        "attacks": f"FGSM and {given.pgd_steps} steps of PGD, epsilon {given.epsilon:g}/255, white-box, on "
        + (f"{given.adversarial_images:,} images, evenly spaced" if given.adversarial_images else "all images")
        if given.adversarial
        else "none",
        "test-time flip": given.flip or config.evaluation.flip,
        "precision": config.train.precision,
        "inference": f"sparse, fp32, on {describe_processor()}; dense runs by torch"
        if given.sparse
        else "by torch, dense",
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, installed or not
    from launchers.start import require_environment

    require_environment()
    from launchers import evaluate_cli
    from pipeline.command_line import leave

    leave(evaluate_cli.main(evaluate, sys.argv[1:]))
