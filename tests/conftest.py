"""Runs the tests on one thread, and without the variables that MLflow or a job of Slurm or MPI may have set.

Small tensors gain nothing from more threads, and spinning threads make a busy machine slow.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
    os.environ.pop(name, None)  # tests would report to the user's server
for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_LOCAL"))]:
    del os.environ[name]  # each test would wait for the other ranks


@pytest.fixture(autouse=True)
def _levels_of_the_log() -> None:
    """Give the loggers their usual levels: a command that runs in this process sets others for all tests after it."""
    logging.getLogger().setLevel(logging.WARNING)
    for package in ("launchers", "pipeline"):
        logging.getLogger(package).setLevel(logging.NOTSET)


# The folders whose files take longest come first, and their longest files before the others. A folder's
# files follow each other, so that each worker sets up once what they share.
LONG_FOLDERS = (
    *("end_to_end", "evaluation", "distributed", "engine", "launchers", "gpu", "benchmarks", "tracking"),
    *("data_prep", "data", "sparse", "verification"),
)
LONG_FILES = (
    *("test_main_job.py", "test_faults.py", "test_preemption.py", "test_evaluate_command.py", "test_presets.py"),
    *("test_agreement.py", "test_reduction.py", "test_engines.py", "test_sweep.py", "test_own_parts.py"),
    *("test_describe.py", "test_loaders.py"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Let workers of pytest-xdist start files in the order below; by itself it begins with those of most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start long files first, so that at the end no worker waits for another one's long file."""
    num_tests = Counter(item.path for item in items)

    def place(item: pytest.Item) -> tuple[int, int, int, str]:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        of_folder = LONG_FOLDERS.index(folder) if folder in LONG_FOLDERS else len(LONG_FOLDERS)
        of_file = LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES)
        return of_folder, of_file, -num_tests[item.path], str(item.path)

    items.sort(key=place)  # stable: the tests of a file keep their order
