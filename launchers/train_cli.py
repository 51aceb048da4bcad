"""Command line of training: checks the configuration before slow imports."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.config_reference import reference
from launchers.ending import ending, log_to_terminal
from launchers.environment import check_environment, limit_instructions, require_rank
from launchers.slips import slip_in
from pipeline.command_line import ArgumentParser, add_version, path_or_url, whole_number
from pipeline.config.load import load_config, to_yaml
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, IntegrityError
from pipeline.files import at_work_in, require_writable
from pipeline.limits import ranks_on_this_node
from pipeline.plan import Plan, build_plan, check_plan, describe_plan, dry_run_plan, plan_warnings, steps_per_epoch_of
from pipeline.redaction import redact
from pipeline.terminal.live import line
from pipeline.tracking.place import check_tracking
from pipeline.training import run_record
from pipeline.training.shapes import check_recalibration, check_shapes, check_shares

if TYPE_CHECKING:
    from pipeline.datasets.sets import DataSets

logger = logging.getLogger(__name__)

EXAMPLES = """\
examples, one for each launcher:
  python launchers/train.py --config fashion_mnist_s90.yaml
  torchrun --nproc-per-node 2 launchers/train.py --config fashion_mnist_s90.yaml
  deepspeed --num_gpus 2 launchers/train.py --config fashion_mnist_s90.yaml
  python -m launchers.run --nproc-per-node 2 -- launchers/train.py --config fashion_mnist_s90.yaml
  srun --nodes 4 --ntasks-per-node 8 --gpus-per-task 1 \\
      python launchers/train.py --config imagenet_r50_s90.yaml data.train=/data/train.beton data.val=/data/val.beton
"""
DRY_RUN_BATCH = 2  # samples per rank and micro-batch


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of launchers/train.py."""
    parser = ArgumentParser(
        prog="launchers/train.py",
        allow_abbrev=False,
        description="Train a sparse network from scratch.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument(
        "--config", required=True, metavar="NAME", help="configuration: a YAML file, or the name of one in configs/"
    )
    parser.add_argument(
        "--resume",
        type=path_or_url,
        default="none",
        metavar="auto|none|PATH",
        help="auto: continue from the newest valid checkpoint of the run; none: start a new run; "
        "PATH: continue from the checkpoint in this folder (default: none)",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="resume even if this configuration key has changed; may be repeated",
    )
    parser.add_argument(
        "--stop-after",
        type=whole_number(1),
        metavar="STEP",
        help="save a checkpoint after this step and stop, with exit code 75; --resume auto continues the run",
    )
    parser.add_argument(
        "--check", action="store_true", help="check the configuration and the plan, then exit without training"
    )
    parser.add_argument(
        "--help-config",
        action=_HelpConfig,
        nargs="?",
        const="",
        metavar="KEY",
        help="explain KEY, or list all configuration keys, then exit",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the complete configuration, with base files, defaults and overrides applied, then exit",
    )
    parser.add_argument(
        "--print-plan", action="store_true", help="print the phases of the run and their lengths in steps, then exit"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run every phase for only two steps with a small batch, in a folder that is deleted at the end",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="configuration setting to override, such as sparsity.density=0.2",
    )
    try:
        given = parser.parse_intermixed_args(list(argv))
        if not given.resume:
            parser.error("argument --resume: expected one argument")
    except ConfigError as error:
        raise slip_in(argv, parser.option_names()) or error from None
    return given


class _HelpConfig(argparse.Action):
    """Prints the reference and exits, as ``--help`` does, so that no ``--config`` is needed."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: Any, option: str | None = None
    ) -> None:
        print(reference(values), end="")
        parser.exit()


def main(train: Callable[..., Any], argv: Sequence[str]) -> int:
    """Parse, check and call ``train(config, plan, sets=…, …)``; return the exit code."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no C++ stack traces: one line reports a lost peer
    with ending() as end:
        arguments = parse(argv)
        check_environment()
        config = end.config = load_config(arguments.config, arguments.overrides)
        end.output_dir = Path(config.output_dir)
        if config.train.portable:
            limit_instructions()
        if arguments.print_config:
            print(redact(to_yaml(config)), end="")
        elif arguments.print_plan or arguments.check:
            check_tracking(config.tracking, end.output_dir)
            plan = check(config) if arguments.check else _checked_plan(config, _num_samples_known(config))
            print(
                describe_plan(plan)
                if arguments.print_plan
                else f"{config.name}: configuration and plan are valid, {plan.num_steps} steps"
            )
            for warning in plan_warnings(plan):
                print(f"warning: {warning}", file=sys.stderr)
        else:
            require_rank()
            log_to_terminal()
            end.is_output_a_log = True
            check_tracking(config.tracking, end.output_dir)
            if arguments.resume not in ("none", "auto"):
                check_checkpoint(Path(arguments.resume))
            if not arguments.dry_run:
                check_output(end.output_dir, resume=arguments.resume)
            config, sets, num_samples = _open_data(config)
            end.config = config
            if arguments.dry_run:
                _dry_run(train, config, num_samples, sets=sets)
            else:
                check_shares(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
                plan = _checked_plan(config, num_samples)
                shown = describe_plan(plan, is_brief=True)
                logger.info("%s, %s: %s", config.model.name, config.sparsity.method, shown)
                for warning in plan_warnings(plan) if os.environ.get("RANK", "0") == "0" else ():
                    logger.warning("%s", warning)
                logger.info("loading torch%s", " and DeepSpeed" if config.train.engine == "deepspeed" else "")
                _check_model(config, plan)
                end.resumes = argv
                train(
                    *(config, plan),
                    sets=sets,
                    resume=arguments.resume,
                    allowed_changes=arguments.allow_change,
                    stop_after=arguments.stop_after,
                )
    return end.code


def check(config: Config) -> Plan:
    """Return the plan, after checking it and the network, as ``--check`` does; the data is not read.

    Raises:
        ConfigError, DataError: the plan or the network is impossible.
    """
    check_shares(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    plan = _checked_plan(config, _num_samples_known(config))
    _check_model(config, plan)
    return plan


def _num_samples_known(config: Config) -> int:
    """Return the size of the training set: from its sidecar if the file exists, else as configured."""
    from pipeline.datasets.sets import inspect, with_num_classes

    if Path(config.data.train).exists():
        train = inspect(config.data.train, level=0)
        with_num_classes(config, train)  # raises for another number
        return train.num_samples
    if not config.data.train_samples:
        raise ConfigError(
            f"data.train_samples: is required to plan, because {config.data.train} does not exist",
            do="set data.train_samples=…",
        )
    return config.data.train_samples


def _open_data(config: Config) -> tuple[Config, DataSets, int]:
    """Return the configuration with the number of classes, the data sets and the number of training samples.

    Warn if the training set does not fit into memory.
    """
    from pipeline.datasets import memory
    from pipeline.datasets.sets import open_data_sets, with_num_classes

    with line.showing(lambda _: f"checking {config.data.train} and {config.data.val}"):
        sets = open_data_sets(config)
    train = sets.train
    assert train is not None
    config = with_num_classes(config, train)
    logger.info(
        "data: %s images to train on, %s to evaluate on, %d classes",
        *(f"{train.num_samples:,}", f"{sets.val.num_samples:,}", train.num_classes),
    )
    if os.environ.get("LOCAL_RANK", "0") == "0":
        memory.warn(train, config.data, ranks_here=ranks_on_this_node())
    return config, sets, train.num_samples


def _checked_plan(config: Config, num_samples: int) -> Plan:
    """Return the plan for ``num_samples`` training samples; raise ConfigError if it cannot be carried out."""
    plan = build_plan(config, steps_per_epoch=steps_per_epoch_of(config, num_samples))
    check_plan(plan, config)
    check_recalibration(config, plan, num_samples)
    return plan


def _check_model(config: Config, plan: Plan) -> None:
    """Check that the network takes the images of ``plan`` and fits what it starts from; nothing is computed."""
    check_shapes(config, plan, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    begins = config.model.from_ticket or config.model.from_state
    if begins and config.model.num_classes:  # 0: there is no data set yet
        from pipeline.training.start import read_start

        read_start(config)


def check_checkpoint(folder: Path) -> None:
    """Check that ``--resume`` is the path of a valid checkpoint; it is checked again once all ranks are up."""
    from pipeline.checkpoint.verify import find_damage

    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ConfigError(f"--resume {folder}: {what}", do="pass a folder <output_dir>/checkpoints/step-…, or auto")
    if reason := find_damage(folder):
        raise IntegrityError(
            f"--resume {folder}: is not a valid checkpoint: {reason}",
            do="resume from another checkpoint, or pass --resume auto",
        )


def check_output(folder: Path, *, resume: str) -> None:
    """Check that output_dir can be used; it is claimed once all ranks are up."""
    require_writable(folder, setting="output_dir")
    if resume == "none" and (folder / run_record.NAME).exists():
        who = at_work_in(folder)
        if who or run_record.is_occupied(folder):
            raise run_record.occupied(folder, who=who)


def _plan_to_try(config: Config, num_samples: int) -> Plan:
    """Return the plan that a dry run shortens.

    What is wrong with it is only a warning, because the data set may be a small stand-in. The plan is
    then that of ``data.train_samples``: a stand-in may be too small for any.
    """
    try:
        plan = build_plan(config, steps_per_epoch=max(1, num_samples // config.train.global_batch))
        check_plan(plan, config)
        check_recalibration(config, plan, num_samples)
    except ConfigError as error:
        logger.warning("with these %d training samples the run itself would fail: %s", num_samples, error)
        size = max(num_samples, config.data.train_samples)
        return build_plan(config, steps_per_epoch=max(1, size // config.train.global_batch))
    return plan


def _dry_run(train: Callable[..., Any], config: Config, num_samples: int, *, sets: DataSets) -> None:
    """Run everything once and small: two steps, an update and a ticket per phase, then a report on a few images."""
    import torch

    batch = DRY_RUN_BATCH * int(os.environ.get("WORLD_SIZE", "1")) * config.train.accumulation
    whole_plan = _plan_to_try(config, num_samples)
    _check_model(config, whole_plan)
    plan = dry_run_plan(whole_plan, global_batch=batch)
    precision = config.train.precision
    if precision != "fp32" and (config.train.device == "cpu" or not torch.cuda.is_available()):
        precision = "fp32"  # emulated otherwise, and a hundred times slower
        logger.info("no GPU: the dry run computes in fp32, not %s", config.train.precision)
    folder = Path(f"{config.output_dir}.dry-run")
    small = dataclasses.replace(
        config,
        output_dir=str(folder),
        data=dataclasses.replace(config.data, num_workers=1),
        train=dataclasses.replace(config.train, global_batch=batch, precision=precision),
        evaluation=dataclasses.replace(
            config.evaluation, batch=DRY_RUN_BATCH, recalibration_batch=DRY_RUN_BATCH, recalibration_batches=2
        ),
        tracking=dataclasses.replace(config.tracking, backend="jsonl", log_every_steps=1),
    )
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        shutil.rmtree(folder, ignore_errors=True)  # left by a dry run that was killed
    try:
        # neither a table of numbers that mean nothing nor the names of files that are removed below
        with contextlib.redirect_stdout(io.StringIO()):
            report = train(small, plan, sets=sets, max_val_samples=4 * DRY_RUN_BATCH)
    finally:
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)
    if is_main:
        done = (
            f"{plan.num_steps} steps in {len(plan.phases)} phases, {len(report.rows)} networks and ensembles evaluated"
        )
        print(f"dry run of {config.name}: ok, {done}; nothing was kept")
