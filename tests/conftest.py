"""Runs the tests on one thread, and without the variables of MLflow that a user may have set.

Small tensors gain nothing from more threads, and spinning threads make a busy machine slow.
"""

from __future__ import annotations

import os

import torch

torch.set_num_threads(1)
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
    os.environ.pop(name, None)  # tests would report to the user's server
