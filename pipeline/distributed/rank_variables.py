"""Which rank this process is, by the variables of the launcher that started it. Standard library only.

torchrun, the deepspeed launcher and ``launchers.run`` set ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``,
``MASTER_ADDR`` and ``MASTER_PORT``, which torch reads. srun, mpirun and mpiexec have names of their own;
:func:`take_place` translates them.
"""

from __future__ import annotations

import os
import re
import socket
import time
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.errors import ConfigError, ServiceError
from pipeline.numbers import is_whole_number

MAX_RANKS = 1 << 20
DEFAULT_PORT = 29500  # torchrun's
FIRST_PORT, NUM_PORTS = 20000, 9000  # derived ports, below those that Linux gives to connections (from 32768)
LOOPBACK = "127.0.0.1"
# variables that only these launchers set for their ranks; RANK may also be set by a user
SETS_RANK = {"CROSS_SIZE": "deepspeed", "TORCHELASTIC_RUN_ID": "torchrun"}
KUBERNETES = "KUBERNETES_SERVICE_HOST"
KUBERNETES_SECONDS = 300.0  # the name of a pod resolves once the pod has an address, which may take minutes


class LauncherError(ConfigError):
    """A variable that differs between ranks is invalid; the rank that has it reports it."""


@dataclass(frozen=True)
class Launcher:
    """A command that starts ranks, and the variables by which it numbers them.

    Attributes:
        command: what a user types.
        rank, world_size: of all tasks that were started together.
        local_rank, local_world_size: among the tasks of this host; the first name that is set counts.
        job: identifies what was started, the same for all ranks.
        with_address: how a user gives all ranks the address of rank 0.
    """

    command: str
    rank: str
    world_size: str
    local_rank: tuple[str, ...]
    local_world_size: tuple[str, ...]
    job: tuple[str, ...]
    with_address: str


SRUN = Launcher(
    "srun",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",  # only set for the tasks of a step, unlike SLURM_NTASKS
    ("SLURM_LOCALID",),
    (),  # see _tasks_of_host
    ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    "export MASTER_ADDR=HOST before srun",
)
# Where several have set their variables, the first one counts: srun may have started the daemons of the others.
LAUNCHERS = (
    Launcher(
        "mpirun",  # of Open MPI
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ("PMIX_NAMESPACE",),
        "mpirun -x MASTER_ADDR=HOST …",
    ),
    Launcher(
        "mpiexec",  # of MPICH and Intel MPI
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
        (),
        "mpiexec -genv MASTER_ADDR HOST …",
    ),
    SRUN,
)


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that a launcher started together."""

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def variables(self) -> dict[str, int]:
        """The numbers under the names that torch reads."""
        return {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_world_size,
        }


def launcher(environ: Mapping[str, str] = os.environ) -> str:
    """Return the command that started this process as one of several ranks; empty if none is known."""
    if own := _sets_rank(environ):
        return own
    started_by = _started_by(environ)
    return started_by.command if started_by and environ[started_by.world_size] != "1" else ""


def rank_here(environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Return rank and rank on this host as text for messages, whether or not the variables are valid; ``?`` if not."""
    rank, local_rank = environ.get("RANK"), environ.get("LOCAL_RANK")
    if rank is None and (started_by := _started_by(environ)) is not None:
        rank = environ[started_by.rank]
        local_rank = next((environ[name] for name in started_by.local_rank if name in environ), local_rank)
    rank = "0" if rank is None else rank
    rank, local_rank = (text if text.isdecimal() else "?" for text in (rank, local_rank or rank))
    return rank, local_rank


def take_place(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set torch's variables if srun, mpirun or mpiexec started this process as one of several ranks.

    Nothing changes under torchrun and the deepspeed launcher, also inside a task of the others, and where only one
    task was started. Variables that the user has set are kept.

    Raises:
        ConfigError: what the launcher has set is contradictory, or not enough.
    """
    if _is_terminal_of_srun(environ):
        raise ConfigError(
            f"environment: this is a terminal of srun --pty with {environ[SRUN.world_size]} tasks, not a rank of a run",
            do="srun without --pty, or python -m launchers.run --nproc-per-node N -- SCRIPT … for N ranks",
        )
    place = place_by_launcher(environ)
    if place is None or ("RANK" in environ and environ.get("WORLD_SIZE") not in (None, str(place.world_size))):
        return  # in the latter case a user's script has numbered other ranks than the tasks, such as several per task
    command = place.launcher.command
    for name, number in place.variables.items():
        if environ.get(name, str(number)) != str(number):
            kind = ConfigError if name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE") else LauncherError
            raise kind(
                f"environment: {name}={environ[name]!r}, but {command} has started this process as rank {place.rank} "
                f"of {place.world_size} (local rank {place.local_rank} of {place.local_world_size})",
                do=f"unset {name}: {command} sets what is needed",
            )
    address, port = meeting_point(environ, place)
    if "MASTER_ADDR" not in environ:
        require_resolvable(address, f"the first host of SLURM_STEP_NODELIST, {address!r},", environ)
    environ.update({name: str(number) for name, number in place.variables.items()})
    environ.update({"MASTER_ADDR": address, "MASTER_PORT": port})


def free_port() -> int:
    """Return a TCP port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def alone_without_launcher(environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Be the only rank if no launcher has set variables: set them, and take them away at the end.

    Else what this process starts later would be told to meet at a port of the past.
    """
    alone = {} if "RANK" in environ else {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    if alone:
        alone |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
    elif "LOCAL_RANK" not in environ:
        alone = {"LOCAL_RANK": "0"}
    before = {name: environ.get(name) for name in alone}
    environ.update(alone)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                environ.pop(name, None)
            else:
                environ[name] = value


def place_by_launcher(environ: Mapping[str, str] = os.environ) -> Place | None:
    """Return the place that srun, mpirun or mpiexec gave this process; None if it is the only one, or of torchrun.

    Raises:
        ConfigError: the variables are invalid, or say too little.
    """
    started_by = None if _sets_rank(environ) or _is_terminal_of_srun(environ) else _started_by(environ)
    if started_by is None:
        return None
    command = started_by.command
    world_size = _number(environ, (started_by.world_size,), 1, MAX_RANKS, command)
    if world_size == 1:
        return None
    rank = _number(environ, (started_by.rank,), 0, world_size - 1, command)
    if started_by is SRUN:
        local_world_size = _tasks_of_host(environ, world_size)
    else:
        names = ("LOCAL_WORLD_SIZE", *started_by.local_world_size)
        if "RANK" in environ and not any(name in environ for name in names):
            return None  # the user knows more than the launcher says
        local_world_size = _number(environ, names, 1, world_size, command)
    local_rank = _number(environ, (*started_by.local_rank, "LOCAL_RANK"), 0, local_world_size - 1, command)
    return Place(started_by, rank, world_size, local_rank, local_world_size)


def meeting_point(environ: Mapping[str, str], place: Place) -> tuple[str, str]:
    """Return host and port where the ranks of ``place`` meet: as the user has set them, or as all ranks derive them.

    Raises:
        ConfigError: the host of rank 0 is not known.
    """
    job = ".".join(environ.get(name, "") for name in place.launcher.job)
    derived = FIRST_PORT + zlib.crc32(job.encode()) % NUM_PORTS if job.strip(".") else DEFAULT_PORT
    port = environ.get("MASTER_PORT", str(derived))
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"], port
    if place.local_world_size == place.world_size:
        return LOOPBACK, port
    hosts = environ.get("SLURM_STEP_NODELIST", "") if place.launcher is SRUN else ""
    # srun can be told which host gets the first task
    if first := ("" if environ.get("SLURM_DISTRIBUTION", "").startswith("arbitrary") else first_host(hosts)):
        return first, port
    raise ConfigError(
        f"environment: {place.launcher.command} started {place.world_size} tasks on several hosts, but does not say on "
        "which of them rank 0 is, and MASTER_ADDR is not set",
        do=f"{place.launcher.with_address} (HOST: the host of rank 0)",
    )


def first_host(hosts: str) -> str:
    """Return the first host of a list as Slurm writes it, such as ``n08`` of ``n[08-10,12],login``; empty if none."""
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])*", hosts)
    return re.sub(r"\[([^,\-]*)[^\]]*\]", r"\1", first[0]) if first else ""


def require_resolvable(host: str, what: str, environ: Mapping[str, str] = os.environ) -> None:
    """Check that the name of rank 0's host has an address here; in Kubernetes, wait for it first.

    Raises:
        ConfigError: it has none.
        ServiceError: the same in Kubernetes, where it may have one later.
    """
    deadline = time.monotonic() + (KUBERNETES_SECONDS if KUBERNETES in environ else 0)
    while True:
        try:
            socket.getaddrinfo(host, None)
        except (OSError, UnicodeError) as error:
            if time.monotonic() < deadline:
                time.sleep(1)
                continue
            kind = ServiceError if KUBERNETES in environ else ConfigError
            raise kind(
                f"environment: {what} does not resolve on this host: {getattr(error, 'strerror', None) or error}",
                do="set MASTER_ADDR (--master-addr) to the name or address by which all hosts reach that of rank 0",
            ) from None
        return


def _sets_rank(environ: Mapping[str, str]) -> str:
    """Return the launcher that sets ``RANK`` itself and has started this process; empty if none."""
    return next((command for name, command in SETS_RANK.items() if name in environ), "")


def _started_by(environ: Mapping[str, str]) -> Launcher | None:
    found = [one for one in LAUNCHERS if one.rank in environ and one.world_size in environ]
    if SRUN in found and _is_shell_of_sbatch(environ):
        found.remove(SRUN)
    if SRUN not in found or len(found) == 1:
        return found[0] if found else None
    # srun --mpi=pmi2 sets the variables of mpiexec too; if they differ, srun has started the daemons of mpiexec
    is_same = all(environ[getattr(found[0], name)] == environ[getattr(SRUN, name)] for name in ("rank", "world_size"))
    return SRUN if is_same else found[0]


def _is_terminal_of_srun(environ: Mapping[str, str]) -> bool:
    """Return whether this is a terminal that srun has opened in the first of several tasks."""
    is_one_of_several = environ.get(SRUN.world_size, "1") != "1" and "RANK" not in environ
    return "SLURM_PTY_PORT" in environ and is_one_of_several and os.isatty(0)


def _is_shell_of_sbatch(environ: Mapping[str, str]) -> bool:
    """Return whether this is a batch script that was submitted by a task of a step, whose variables it inherits."""
    tasks_of_first_host = environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    return environ.get("SLURM_GTIDS") == "0" and re.match(r"1(?!\d)", tasks_of_first_host) is None


def _number(environ: Mapping[str, str], names: tuple[str, ...], lowest: int, highest: int, command: str) -> int:
    """Return the number of the first of these variables that is set."""
    name = next((name for name in names if name in environ), None)
    if name is None:
        raise ConfigError(
            f"environment: {command} has started several tasks, but {' or '.join(names)} is not set",
            do=f"set {names[0]} for each task",
        )
    if not is_whole_number(environ[name], lowest, highest):
        raise LauncherError(
            f"environment: {name}={environ[name]!r} is not a whole number from {lowest} to {highest}",
            do=f"correct it; {command} sets it itself",
        )
    return int(environ[name])


def _tasks_of_host(environ: Mapping[str, str], world_size: int) -> int:
    """Return how many tasks of the step run on this host: its entry of a list such as ``2(x3),1``."""
    if environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES")) == "1":
        return world_size
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"([1-9]\d{0,6})(?:\(x([1-9]\d{0,6})\))?", entry, re.ASCII)
        counts += [int(match[1])] * min(int(match[2] or 1), MAX_RANKS) if match else []
    host = _number(environ, ("SLURM_NODEID",), 0, MAX_RANKS, "srun")
    if sum(counts) != world_size or host >= len(counts):
        raise LauncherError(
            f"environment: SLURM_STEP_TASKS_PER_NODE={text!r} is not a list of {world_size} tasks with an entry for "
            f"SLURM_NODEID={host}",
            do="correct them; srun sets them itself",
        )
    return counts[host]
