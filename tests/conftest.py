"""One thread in this process: small tensors gain nothing from more, and threads that spin for each other make a busy machine slow."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
