"""Check what would end a run later: its configuration, data, devices, storage, names and MLflow, on this node.

    python -m launchers.preflight --nnodes 4 --nproc-per-node 8 --master-addr train-0.train --
    launchers/train.py --config NAME

The options and the command after ``--`` are those of launchers.run, so ``run`` becomes ``preflight`` and
nothing else changes. Each check prints one line. Nothing is trained, and nothing stays behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import os
import shutil
import socket
import sys
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit

from launchers import run, train_cli, verdict
from launchers.meeting import require_address
from launchers.start import require_environment
from pipeline.command_line import ArgumentParser, error_line, local_path, run_to_end
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.errors import RunError, ServiceError, WriteError
from pipeline.files import cannot_read, write_atomically
from pipeline.plan import Plan
from pipeline.redaction import redact
from pipeline.tracking.place import check_tracking, where
from pipeline.training.shapes import check_shapes, check_shares

SCRIPT = "launchers/train.py"
RESPONSE_SECONDS = 10.0
TEST_BYTES = 1 << 20


class Finding(NamedTuple):
    """What a check has found that does not end a run. ``is_fine`` is false for what the run's owner should know."""

    text: str
    is_fine: bool = True


class Start(NamedTuple):
    """The run that is to be started."""

    options: argparse.Namespace  # of launchers.run, with data_from
    arguments: argparse.Namespace  # of launchers/train.py
    config: Config

    @property
    def num_ranks(self) -> int:
        """Of all nodes."""
        return int(self.options.nnodes * self.options.nproc_per_node)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the options before the first ``--``, as launchers.run does, and the one of this command.

    Raises:
        ConfigError: the command line is invalid.
    """
    parser = ArgumentParser(
        prog="python -m launchers.preflight",
        usage="%(prog)s [options] -- launchers/train.py ARGS…",
        description="Check on this node, without training, that the run can start: configuration for this number of "
        "ranks, data, devices, shared memory, storage, names, MLflow. Every check prints one line; the exit code is "
        "that of launchers.run for the most informative error. The options are those of launchers.run.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data-from",
        type=local_path,
        metavar="FOLDER",
        help="check the data files in FOLDER, from which they will be staged (copied) to where the configuration "
        "names them",
    )
    options = run.parse(argv, parser)
    if Path(options.command[0]).name != Path(SCRIPT).name:
        parser.error(f"expected {SCRIPT} and its arguments after --, got {options.command[0]!r}")
    return options


def main() -> int:
    """Make all checks; return 0, or the most informative exit code of those that failed."""
    require_environment()
    return run_to_end(lambda: check_all(parse(sys.argv[1:])))


def check_all(options: argparse.Namespace) -> int:
    """Make every check and print its line; without a valid configuration there is nothing else to check."""
    arguments = train_cli.parse(options.command[1:])
    start = Start(options, arguments, load_config(arguments.config, arguments.overrides))
    codes: list[int] = []
    for name, check in CHECKS.items():
        try:
            finding = check(start)
        except RunError as error:
            print(error_line(error.code, f"{name}: {error.what}", do=error.do), file=sys.stderr, flush=True)
            codes.append(error.code)
            if check is configuration:
                break
        else:
            print(f"{'ok' if finding.is_fine else 'warning'}: {name}: {finding.text}", flush=True)
    return verdict.agreed_code(codes[0] if codes else 0, codes)


def configuration(start: Start) -> Finding:
    """Check configuration, plan and network for this number of ranks; as ``--check`` does, without the data."""
    config, options = start.config, start.options
    check_tracking(config.tracking, Path(config.output_dir))
    if start.options.data_from is not None:  # the files are not yet where the configuration names them
        check_shares(config, world_size=start.num_ranks)
        return Finding(f"{config.name}, {_size(options)}, {config.train.global_batch} images in a step")
    plan = _checked(config, start.num_ranks)
    return Finding(f"{config.name}, {_size(options)}, {plan.num_steps:,} steps of {config.train.global_batch} images")


def data(start: Start) -> Finding:
    """Check files, sidecars and classes, and the plan for the number of images that there are."""
    from pipeline.datasets.sets import open_data_sets, with_num_classes

    config = _with_data_in(start.options.data_from, start.config)
    sets = open_data_sets(config)
    assert sets.train is not None
    _checked(with_num_classes(config, sets.train), start.num_ranks)
    return Finding(
        f"{sets.train.num_samples:,} images to train on, {sets.val.num_samples:,} to evaluate on, "
        f"{sets.train.num_classes} classes, in {Path(config.data.train).parent}"
    )


def devices(start: Start) -> Finding:
    """Check that the ranks of this node find what ``train.device`` asks for, a GPU for each."""
    import torch

    from pipeline.distributed import device

    wanted, num = start.config.train.device, start.options.nproc_per_node
    choice = device.choose(wanted, 0)
    if choice.problem:
        raise ServiceError(choice.problem, do=choice.do)
    if choice.kind == device.CPU:
        return Finding(f"{num} ranks on {choice.name}, {choice.software}")
    found = torch.cuda.device_count()
    if found < num and start.config.train.backend != "gloo":  # with which ranks may share a GPU
        raise ServiceError(
            f"torch can use {found} GPUs on this node, expected {num}, one for each rank",
            do="check nvidia-smi, or start fewer ranks on each node (--nproc-per-node)",
        )
    return Finding(f"{num} ranks, {found} × {choice.name}, {choice.software}")


def shared_memory(start: Start) -> Finding:
    """Check that /dev/shm is large enough for the ranks of this node."""
    from pipeline.distributed import machine

    free, needed = shutil.disk_usage(machine.SHARED_MEMORY).free, machine.SHARED_MEMORY_BYTES
    needed *= start.options.nproc_per_node
    text = f"{free >> 20} MiB of {machine.SHARED_MEMORY} are free"
    is_enough = free >= needed or start.options.nproc_per_node == 1
    return Finding(text if is_enough else f"{text}, the ranks may need {needed >> 20}", is_enough)


def storage(start: Start) -> Finding:
    """Check that the folder of the run can be written, by writing a file there and reading it again."""
    folder = Path(start.config.output_dir)
    train_cli.check_output(folder, resume=start.arguments.resume)
    if start.arguments.resume not in ("none", "auto"):
        train_cli.check_checkpoint(Path(start.arguments.resume))
    existing = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    path = existing / f".preflight-{socket.gethostname()}-{os.getpid()}"
    content = os.urandom(TEST_BYTES)
    try:
        write_atomically(path, content)
        try:
            is_same = path.read_bytes() == content
        except OSError as error:
            raise cannot_read(path, error) from None
        if not is_same:
            raise WriteError(f"{existing}: a file that was written there has other content", do="check the storage")
    finally:
        path.unlink(missing_ok=True)
    free = shutil.disk_usage(existing).free
    return Finding(f"{folder} can be written, {free >> 30} GiB are free")


def names(start: Start) -> Finding:
    """Check that the host of node 0 has an address here; in Kubernetes it gets one when its pod is placed."""
    host = start.options.master_addr
    if start.options.nnodes == 1:
        return Finding("one node, none needed")
    try:
        return Finding(f"{host} is {socket.getaddrinfo(host, None)[0][4][0]}")
    except (OSError, UnicodeError):
        require_address(host)  # raises outside of Kubernetes
        return Finding(f"{host} has no address yet; launchers.run waits for it", False)


def tracking(start: Start) -> Finding:
    """Check that MLflow's server responds. Training goes on without it, so this is never an error."""
    config = start.config.tracking
    if config.backend != "mlflow":
        return Finding(f"not used (tracking.backend={config.backend})")
    uri = where(Path(start.config.output_dir), config).uri
    address = urlsplit(uri)
    if address.scheme not in ("http", "https"):
        return Finding(f"{redact(uri)}, which is not a server")
    server = f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path.rstrip('/')}"
    try:
        with urllib.request.urlopen(f"{server}/health", timeout=RESPONSE_SECONDS):
            return Finding(f"{server} responds")
    except HTTPError as error:
        reason = f"status {error.code}"
    except (OSError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
    return Finding(f"{server} does not respond ({reason}): training goes on and sends its records later", False)


CHECKS: dict[str, Callable[[Start], Finding]] = {
    "configuration": configuration,
    "data": data,
    "devices": devices,
    "shared memory": shared_memory,
    "output_dir": storage,
    "names": names,
    "MLflow": tracking,
}


def _checked(config: Config, num_ranks: int) -> Plan:
    """Return the plan, after checking it and the network for this number of ranks."""
    check_shares(config, world_size=num_ranks)
    plan = train_cli.check(config)
    check_shapes(config, plan, world_size=num_ranks)
    return plan


def _size(options: argparse.Namespace) -> str:
    nodes = f"{options.nnodes} node{'s' * (options.nnodes > 1)}"
    return f"{nodes} × {options.nproc_per_node} rank{'s' * (options.nproc_per_node > 1)}"


def _with_data_in(folder: Path | None, config: Config) -> Config:
    """Return the configuration with the data files in ``folder``, and without staging, which would copy them."""
    sets = dataclasses.replace(config.data, stage="")
    evaluation = config.evaluation
    if folder is not None:
        where_copies_go = Path(sets.train).parent
        if evaluation.held_out and Path(evaluation.held_out).parent == where_copies_go:
            evaluation = dataclasses.replace(evaluation, held_out=str(folder / Path(evaluation.held_out).name))
        train, val = (str(folder / Path(path).name) for path in (sets.train, sets.val))
        sets = dataclasses.replace(sets, train=train, val=val)
    return dataclasses.replace(config, data=sets, evaluation=evaluation)


if __name__ == "__main__":
    sys.exit(main())
