"""Runs the tests on one thread.

Small tensors gain nothing from more threads, and spinning threads make a busy machine slow.
"""

from __future__ import annotations

import torch

torch.set_num_threads(1)
