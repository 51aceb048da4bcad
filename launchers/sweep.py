r"""Train every combination of settings with several seeds, and compare them: means, paired differences, intervals.

    python launchers/sweep.py --config fashion_mnist_s90 --set sparsity.method=set,rigl_itop \
        --set sparsity.density=0.05,0.1 --seeds 3 --output runs/methods

Each run is a process of launchers/train.py in a folder of its own. Started again with the same command, a sweep that
was stopped or killed keeps what is done and continues the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launchers.sweep_jobs import HowToRun
    from launchers.sweep_members import Member
    from launchers.sweep_table import Table


def sweep(
    members: Sequence[Member],
    folder: Path,
    how: HowToRun | None,
    *,
    only: Sequence[str] = (),
    baseline: str = "",
    against: str = "",
) -> Table:
    """Run the members that are not done yet, and return the table of all; one that fails does not end the others.

    Args:
        members: all members of the sweep.
        folder: of the sweep.
        how: how members are started; None: nothing is started, because the tasks of an array train them.
        only: which of them to run now, such as ``method=set,seed=0``; none: all.
        baseline: the combination that the others are compared with; empty: the first.
        against: the network of the baseline that all networks are compared with; empty: the same one.

    Raises:
        ConfigError: ``folder`` holds another sweep, or there is no such ``baseline``.
        WriteError, PermissionDenied: the folder is in use, or cannot be written.
        Preempted: a signal asked to stop; every member can be continued.
    """
    from launchers import sweep_output
    from launchers.sweep_jobs import run_members
    from launchers.sweep_members import chosen, opened_record
    from launchers.sweep_table import collect
    from pipeline.files import only_process_in

    folder.mkdir(parents=True, exist_ok=True)
    with only_process_in(folder):
        record = opened_record(folder, members)
        record.save()
        with sweep_output.open_parent_run(record, members) as tracker:
            if how is not None:
                run_members(chosen(members, only), record, how)
            table = collect(record, baseline=baseline, against=against)
            sweep_output.publish(table, folder, tracker)
            return table


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, installed or not
    from launchers.start import require_environment

    require_environment()
    from launchers import sweep_cli
    from pipeline.command_line import leave

    leave(sweep_cli.main(sweep, sys.argv[1:]))
