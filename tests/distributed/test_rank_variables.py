"""srun, mpirun and mpiexec number ranks in their own variables; what they say is used, or refused in one line."""

from __future__ import annotations

import os
import re
import socket
import time

import pytest

from launchers import run, sweep_cli, verify
from launchers.environment import check_environment, require_one_process, require_rank
from pipeline import limits
from pipeline.distributed import rank_variables
from pipeline.distributed.rank_variables import (
    FIRST_PORT,
    NUM_PORTS,
    first_host,
    launcher,
    rank_here,
    require_resolvable,
    take_place,
)
from pipeline.errors import ConfigError, ServiceError

Environment = dict[str, str]

# As Slurm 22.05 sets them (tests/end_to_end/test_slurm.py runs it): four tasks on two hosts, three on the first.
STEP = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "3,1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "0",
    "SLURM_LOCALID": "2",
    "SLURM_GTIDS": "0,1,2",
}
ONE_HOST = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_STEP_NODELIST": "gpu07"}
ONE_HOST |= {"SLURM_GTIDS": "0,1,2,3"}
BATCH = {"SLURM_JOB_ID": "71", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
BATCH |= {"SLURM_NODEID": "0", "SLURM_GTIDS": "0"}
# Open MPI 4.1 and MPICH 4.0, rank 1 of 2
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "1512636417",
    "PMIX_RANK": "1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
TORCHRUN |= {"TORCHELASTIC_RUN_ID": "none"}
DEEPSPEED = {**TORCHRUN, "CROSS_SIZE": "1"}
del DEEPSPEED["TORCHELASTIC_RUN_ID"]


@pytest.fixture(autouse=True)
def every_name_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [])


def placed(environ: Environment) -> Environment:
    """Return the variables that :func:`take_place` adds or changes."""
    after = dict(environ)
    take_place(after)
    return {name: after[name] for name in after if environ.get(name) != after[name]}


def numbers(rank: int, world_size: int, local_rank: int, local_world_size: int) -> Environment:
    given = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_world_size}
    return {name: str(number) for name, number in given.items()}


@pytest.mark.parametrize(
    ("environ", "expected", "host", "command"),
    [
        (STEP, numbers(2, 4, 2, 3), "gpu07", "srun"),
        (STEP | {"SLURM_PROCID": "3", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}, numbers(3, 4, 0, 1), "gpu07", "srun"),
        (STEP | ONE_HOST, numbers(2, 4, 2, 4), "127.0.0.1", "srun"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"}, numbers(2, 4, 1, 2), "gpu07", "srun"),
        (STEP | {"PMI_RANK": "2", "PMI_SIZE": "4", "PMI_JOBID": "71.0"}, numbers(2, 4, 2, 3), "gpu07", "srun"),
        (OPEN_MPI, numbers(1, 2, 1, 2), "127.0.0.1", "mpirun"),
        (MPICH, numbers(1, 2, 1, 2), "127.0.0.1", "mpiexec"),
        # mpirun in a job of Slurm starts one daemon on each host by srun, and the daemons start the ranks
        (STEP | OPEN_MPI, numbers(1, 2, 1, 2), "127.0.0.1", "mpirun"),
        (STEP | MPICH, numbers(1, 2, 1, 2), "127.0.0.1", "mpiexec"),
    ],
)
def test_rank_size_and_address_are_those_of_the_launcher(
    environ: Environment, expected: Environment, host: str, command: str
) -> None:
    after = placed(environ)
    port = int(after.pop("MASTER_PORT"))
    assert after == expected | {"MASTER_ADDR": host}
    assert launcher(environ) == command and launcher(environ | after) == command
    assert rank_here(environ) == rank_here(environ | after) == (expected["RANK"], expected["LOCAL_RANK"])
    assert FIRST_PORT <= port < FIRST_PORT + NUM_PORTS or (command == "mpiexec" and port == 29500)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        BATCH,  # a batch script's own shell
        {name: text for name, text in BATCH.items() if "ID" not in name},  # of salloc
        STEP | ONE_HOST | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"},
        # a batch script that a task of a step has submitted inherits the variables of the step
        STEP | BATCH,
        TORCHRUN,
        STEP | TORCHRUN,  # in a task of srun
        STEP | DEEPSPEED,
        OPEN_MPI | TORCHRUN,
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        STEP | {"RANK": "9", "WORLD_SIZE": "16"},  # a script that starts several ranks in each task
        MPICH | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"},  # see below for LOCAL_…
    ],
)
def test_what_is_no_task_of_several_or_has_its_own_launcher_is_left_alone(environ: Environment) -> None:
    if "PMI_RANK" in environ:
        environ = {name: text for name, text in environ.items() if not name.startswith("MPI_LOCAL")}
    assert placed(environ) == {}
    assert launcher(environ) in ("", "torchrun", "deepspeed") or "RANK" in environ


def test_what_the_user_has_set_is_kept() -> None:
    own = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000", "WORLD_SIZE": "4"}
    assert placed(STEP | own) == {"RANK": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}
    assert placed(STEP | own | {"RANK": "2"}) == {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}


def test_steps_and_jobs_have_ports_of_their_own_which_all_ranks_agree_on() -> None:
    def port(**changed: str) -> str:
        return placed(STEP | changed)["MASTER_PORT"]

    assert port() == port(SLURM_PROCID="0", SLURM_LOCALID="0")
    assert len({port(), port(SLURM_STEP_ID="1"), port(SLURM_JOB_ID="72")}) == 3
    assert port() == "22939"  # 20000 + crc32("71.0") % 9000: what docs/distributed.md says


UNKNOWN_HOST = (
    r"started 4 tasks on several hosts, but does not say on which of them rank 0 is, and MASTER_ADDR is not set"
)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            STEP | {"WORLD_SIZE": "8"},
            r"WORLD_SIZE='8', but srun has started this process as rank 2 of 4 \(local rank 2 of",
        ),
        (STEP | {"RANK": "0"}, r"RANK='0', but srun has started this process as rank 2 of 4 .*; do: unset RANK"),
        (STEP | {"LOCAL_RANK": "0"}, r"LOCAL_RANK='0', but srun"),
        (STEP | {"LOCAL_WORLD_SIZE": "4"}, r"LOCAL_WORLD_SIZE='4', but srun"),
        (STEP | {"SLURM_PROCID": "x"}, r"SLURM_PROCID='x' is not a whole number from 0 to 3"),
        (STEP | {"SLURM_PROCID": "4"}, r"SLURM_PROCID='4' is not a whole number from 0 to 3"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "-2"}, r"SLURM_STEP_NUM_TASKS='-2' is not a whole number from 1"),
        (STEP | {"SLURM_LOCALID": "3"}, r"SLURM_LOCALID='3' is not a whole number from 0 to 2"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2"}, r"SLURM_STEP_TASKS_PER_NODE='2' is not a list of 4 tasks"),
        (
            STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x9", "SLURM_NODEID": "1"},
            r"is not a list of 4 tasks with an entry for",
        ),
        (STEP | {"SLURM_NODEID": "2"}, r"is not a list of 4 tasks with an entry for SLURM_NODEID=2"),
        (STEP | {"SLURM_STEP_NODELIST": ""}, rf"srun {UNKNOWN_HOST}; do: export MASTER_ADDR=HOST before srun"),
        (STEP | {"SLURM_DISTRIBUTION": "arbitrary"}, UNKNOWN_HOST),  # task 0 may be on any host
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"},
            rf"mpirun {UNKNOWN_HOST}; do: mpirun -x MASTER_ADDR=HOST … \(HOST: the host of rank 0\)",
        ),
        (MPICH | {"PMI_SIZE": "4"}, rf"mpiexec {UNKNOWN_HOST}; do: mpiexec -genv MASTER_ADDR HOST …"),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, r"but LOCAL_WORLD_SIZE or MPI_LOCALNRANKS or PMI_LOCAL_SIZE is not set"),
    ],
)
def test_contradictions_and_what_is_not_enough_are_one_line(environ: Environment, expected: str) -> None:
    before = dict(environ)
    with pytest.raises(ConfigError, match=f"^environment: .*{expected}") as caught:
        take_place(environ)
    assert "\n" not in str(caught.value) and environ == before


def test_a_terminal_of_several_tasks_is_not_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = STEP | ONE_HOST | {"SLURM_PTY_PORT": "38793"}
    assert placed(shell)["RANK"] == "2"  # of a step that was started from such a terminal
    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    with pytest.raises(
        ConfigError, match=r"a terminal of srun --pty with 4 tasks, not a rank of a run; do: srun without"
    ):
        take_place(shell)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-08]", "gpu07"),
        ("n[3,08-10],login", "n3"),
        ("n[008,010-099]", "n008"),
        ("rack1-gpu[2-3],rack2-gpu1", "rack1-gpu2"),
        ("r[1-2]n[03-04]", "r1n03"),
        ("a,b[1-2]", "a"),
        ("", ""),
        (",a", ""),
        ("n[1-2", "n"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_a_name_that_does_not_resolve_is_said_to_be_that(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def getaddrinfo(host: str, port: None) -> list[object]:
        tries.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    says = r"does not resolve on this host: Name or service not known; do: set MASTER_ADDR"
    with pytest.raises(ConfigError, match=rf"^environment: MASTER_ADDR='nowhere' {says}"):
        check_environment({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere", "MASTER_PORT": "29400"})
    with pytest.raises(ConfigError, match=rf"^environment: the first host of SLURM_STEP_NODELIST, 'gpu07', {says}"):
        check_environment(dict(STEP))
    assert tries == ["nowhere", "gpu07"]
    monkeypatch.setattr(rank_variables, "KUBERNETES_SECONDS", 0.05)  # where the name of a pod comes with its address
    with pytest.raises(ServiceError, match=says):
        require_resolvable("train-0.train", "MASTER_ADDR='train-0.train'", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert len(tries) > 3


def test_a_world_without_a_rank_does_not_train_alone() -> None:
    environ = BATCH | {"WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "29400"}
    check_environment(environ)  # as --check does for that many ranks
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=4, but RANK is not set; do: start the ranks with srun"):
        require_rank(environ)
    require_rank({"WORLD_SIZE": "1"})


@pytest.mark.parametrize(
    ("what", "advice", "command"),
    [
        ("sweeps", sweep_cli.ONCE, r"plain python, or srun --ntasks 1 \(--jobs"),
        ("verifications", verify.ONCE, "plain python, or srun --ntasks 1 python -m launchers.verify …"),
    ],
)
def test_what_starts_ranks_of_its_own_is_started_once(
    what: str, advice: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank in ("0", "1"):
        environ = STEP | ONE_HOST | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        check_environment(environ)
        with pytest.raises(ConfigError if rank == "0" else SystemExit) as caught:
            require_one_process(what, advice, environ)
        if rank == "0":
            says = rf"^environment: srun has started 4 {what}, expected one, which starts its ranks itself; do: .*"
            assert re.match(says + command, str(caught.value)) and not waited
    assert getattr(caught.value, "code", None) == ConfigError.code and waited  # until the line of rank 0 is out
    require_one_process(what, advice, {"WORLD_SIZE": "1", "RANK": "0"})


def supervisor(monkeypatch: pytest.MonkeyPatch, environ: Environment, *options: str) -> tuple[int, int, str, int]:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "JOB_COMPLETION"))]:
        monkeypatch.delenv(name)
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    parsed = run.parse([*options, "--", "train.py"])
    return parsed.nnodes, parsed.node_rank, parsed.master_addr, parsed.master_port


ONE_EACH = STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_STEP_NUM_NODES": "4"}
ONE_EACH |= {"SLURM_NODEID": "2", "SLURM_LOCALID": "0", "SLURM_GTIDS": "2"}


def test_the_supervisor_as_a_task_on_each_host_takes_the_nodes_from_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert supervisor(monkeypatch, ONE_EACH) == (4, 2, "gpu07", 22939)
    assert supervisor(monkeypatch, ONE_EACH, "--nnodes", "4") == (4, 2, "gpu07", 22939)
    assert supervisor(monkeypatch, ONE_EACH, "--master-addr", "h", "--master-port", "4000") == (4, 2, "h", 4000)
    nodes, rank, host, _ = supervisor(monkeypatch, ONE_EACH, "--nnodes", "1")  # a run of its own in each task
    assert (nodes, rank, host) == (1, 0, "127.0.0.1")
    with pytest.raises(
        ConfigError, match=r"^launchers.run: srun has started 3 tasks on this node, expected one, which"
    ):
        supervisor(monkeypatch, STEP)


@pytest.mark.parametrize(
    ("usable", "changed", "expected"),
    [
        (4, {}, 4),  # each task is bound to its own 4 of the 32 CPUs that the 8 tasks have
        (16, {}, 4),  # four tasks share a socket
        (32, {}, 4),  # nothing is bound
        (2, {}, 2),  # or a quota leaves fewer
        (32, {"SLURM_CPUS_ON_NODE": "4"}, 1),
        (32, {"TORCHELASTIC_RUN_ID": "none", "SLURM_CPUS_ON_NODE": "64"}, 4),  # torchrun in one task of two
        (32, {"SLURM_CPUS_ON_NODE": "many"}, 4),
    ],
)
def test_a_task_of_slurm_does_not_share_the_cpus_that_are_bound_to_it(
    usable: int, changed: Environment, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "usable_cpus", lambda root: usable)
    task = {"SLURM_PROCID": "2", "SLURM_CPUS_ON_NODE": "32", "RANK": "2", "LOCAL_WORLD_SIZE": "8"}
    assert limits.cpus_of_rank(task | changed) == expected


def test_the_variables_of_a_process_alone_end_with_its_group() -> None:
    environ: dict[str, str] = {}
    ports = []
    for _ in range(2):
        with rank_variables.alone_without_launcher(environ):
            ports.append(environ.pop("MASTER_PORT"))
            assert environ == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        assert environ == {}
    assert all(0 < int(port) < 65536 for port in ports)
    with rank_variables.alone_without_launcher(environ := {"RANK": "1", "MASTER_PORT": "7"}):
        assert environ == {"RANK": "1", "MASTER_PORT": "7", "LOCAL_RANK": "0"}
    assert environ == {"RANK": "1", "MASTER_PORT": "7"}
