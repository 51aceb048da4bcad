"""Runs the tests on one thread, and without the variables that MLflow or a job of Slurm or MPI may have set.

Small tensors gain nothing from more threads, and spinning threads make a busy machine slow.
"""

from __future__ import annotations

import logging
import os

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
