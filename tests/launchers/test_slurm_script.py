"""The batch script: what shellcheck says about both of its variants, and that our own parsers accept their commands.

tests/end_to_end/test_slurm.py runs it.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from launchers import run, train_cli
from tests.support.launch import ROOT

SCRIPT = (ROOT / "launchers" / "slurm.sbatch").read_text()


def variant(number: int) -> str:
    """Return the script with the commands of one variant only, as the user would comment them in and out."""
    head, _, rest = SCRIPT.partition("# Variant 1")
    first, _, rest = rest.partition("# Variant 2")
    second, _, tail = rest.partition("# 75: asked to stop")
    command = first if number == 1 else re.sub(r"^# (srun|    python|code=)", r"\1", second, flags=re.MULTILINE)
    return f"{head}# Variant {number}{command}# 75: asked to stop{tail}"


def command_of(number: int) -> list[str]:
    """Return what srun starts, with one argument in place of those of the script."""
    (run,) = re.findall(r'^    set -- (launchers/train\.py .*) "\$@"$', SCRIPT, re.MULTILINE)
    text = variant(number).replace("\\\n", " ").replace('"$@"', f"{run} --config=fashion_mnist_s90")
    (line,) = re.findall(r"^srun .*$", text, re.MULTILINE)
    return shlex.split(line)[1:]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not here: apt-get install shellcheck")
@pytest.mark.parametrize("number", [1, 2])
def test_shellcheck_has_nothing_to_say(number: int, tmp_path: Path) -> None:
    script = tmp_path / "slurm.sbatch"
    script.write_text(variant(number))
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_srun_starts_the_ranks_or_a_supervisor_of_them() -> None:
    cpus = "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}"
    options, *command = command_of(1)
    assert (options, command[:2]) == (cpus, ["python", "launchers/train.py"])
    assert train_cli.parse(command[2:]).resume == "auto"
    options, *command = command_of(2)
    assert (options, command[:3]) == (cpus, ["python", "-m", "launchers.run"])
    supervisor = run.parse(command[3:])
    assert supervisor.nproc_per_node == 8 and supervisor.command[0] == "launchers/train.py"
    assert train_cli.parse(supervisor.command[1:]).resume == "auto"


def test_ranks_are_asked_to_stop_in_time_and_75_requeues() -> None:
    options = re.findall(r"^#SBATCH (.*)$", SCRIPT, re.MULTILINE)
    assert {"--signal=USR1@120", "--requeue", "--open-mode=append"} <= set(
        options
    )  # not B:USR1, which is for the shell
    assert 'if [ "$code" -eq 75 ]; then\n    scontrol requeue "$SLURM_JOB_ID"\nfi\nexit "$code"\n' in SCRIPT
