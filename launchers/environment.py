"""Check the environment variables that a launcher or a user sets, before torch is imported."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

from launchers.verdict import EXIT_DIR
from pipeline.distributed.rank_variables import (
    MAX_RANKS,
    LauncherError,
    launcher,
    require_resolvable,
    take_place,
)
from pipeline.errors import ConfigError
from pipeline.numbers import is_whole_number

MAX_THREADS = 4096
LINGER_SECONDS = 2.0
RANKS = {  # name -> lowest, highest
    "RANK": (0, MAX_RANKS),
    "WORLD_SIZE": (1, MAX_RANKS),
    "LOCAL_RANK": (0, MAX_RANKS),
    "LOCAL_WORLD_SIZE": (1, MAX_RANKS),
    "LOCAL_SIZE": (1, MAX_RANKS),
}
PORTABLE = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}
HOST = re.compile(r"[A-Za-z0-9_.:%-]{1,255}")


def check_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Check the variables before a library uses them, where an invalid one is a traceback or a hang.

    The variables of srun, mpirun and mpiexec are translated first.

    Raises:
        ConfigError: a variable is invalid.
    """
    take_place(environ)
    for name, bounds in RANKS.items():
        if name in environ:
            _require_number(name, environ[name], *bounds, kind=LauncherError)
    if "RANK" in environ:
        for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name not in environ:
                raise LauncherError(
                    f"environment: RANK is set, but {name} is not",
                    do="start ranks with torchrun or deepspeed, or unset RANK",
                )
        if int(environ["RANK"]) >= int(environ["WORLD_SIZE"]):
            raise LauncherError(
                f"environment: RANK={environ['RANK']} is out of range for WORLD_SIZE={environ['WORLD_SIZE']}, "
                f"expected 0 to {int(environ['WORLD_SIZE']) - 1}",
                do="number ranks from 0",
            )
        _require_number("MASTER_PORT", environ["MASTER_PORT"], 1, 65535)
        if not HOST.fullmatch(environ["MASTER_ADDR"]):
            raise ConfigError(
                f"environment: MASTER_ADDR={environ['MASTER_ADDR']!r} is not a host name",
                do="set it to the host name or IP address of the machine of rank 0",
            )
        require_resolvable(environ["MASTER_ADDR"], f"MASTER_ADDR={environ['MASTER_ADDR']!r}", environ)
    for threads in filter(None, environ.get("OMP_NUM_THREADS", "").split(",")):  # one number for each level of nesting
        _require_number("OMP_NUM_THREADS", threads.strip(), 1, MAX_THREADS)
    for name in filter(None, environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        known = [interface for _, interface in socket.if_nameindex()]
        if name not in known:
            raise ConfigError(
                f"environment: GLOO_SOCKET_IFNAME={name!r} is not a network interface of this machine",
                do=f"choose one of {', '.join(known)}",
            )
    if EXIT_DIR in environ and not Path(environ[EXIT_DIR]).is_dir():
        raise ConfigError(
            f"environment: {EXIT_DIR}={environ[EXIT_DIR]!r} is not a folder",
            do="unset it; python -m launchers.run sets it itself",
        )


def limit_instructions() -> None:
    """Limit torch, oneDNN and MKL to what every x86-64 processor with AVX2 has; call it before torch is imported."""
    os.environ.update(PORTABLE)


def require_rank(environ: MutableMapping[str, str] = os.environ) -> None:
    """Check, before training starts, that no process of several is about to train alone.

    Raises:
        ConfigError: there are to be several ranks, but nothing says which one this is.
    """
    if "RANK" not in environ and environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"environment: WORLD_SIZE={environ['WORLD_SIZE']}, but RANK is not set",
            do="start the ranks with srun, mpirun, torchrun or deepspeed, or unset WORLD_SIZE to train with one",
        )


def require_one_process(what: str, advice: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Check that a command that starts ranks of its own was started once; rank 0 reports it.

    Args:
        what: what has been started several times, in the plural, such as ``sweeps``.
        advice: the line to type instead.
        environ: the variables of the launcher, as :func:`check_environment` leaves them.

    Raises:
        ConfigError: a launcher has started several, and this is rank 0.
        SystemExit: with the same code, for the others.
    """
    if (num := environ.get("WORLD_SIZE", "1")) == "1" or "RANK" not in environ:
        return
    if environ["RANK"] != "0":
        time.sleep(LINGER_SECONDS)  # a launcher that sees one end kills the others, and the line must be out before
        sys.exit(ConfigError.code)
    raise ConfigError(
        f"environment: {launcher(environ) or 'a launcher'} has started {num} {what}, expected one, which starts its "
        "ranks itself",
        do=advice,
    )


def _require_number(name: str, text: str, lowest: int, highest: int, *, kind: type[ConfigError] = ConfigError) -> None:
    if not (is_whole_number(text, lowest, highest)):
        raise kind(
            f"environment: {name}={text!r} is not a whole number from {lowest} to {highest}", do="correct or unset it"
        )
