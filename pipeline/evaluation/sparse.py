"""The networks of a report by sparse inference on the CPU, and how many milliseconds an image takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.inference.timing import Latency, in_turns, thread_ms

if TYPE_CHECKING:
    from pipeline.inference import SparseNetwork

NUM_CALLS = 200  # of one image each: two of them are above the 99th percentile
MAX_SECONDS = 20.0  # for the calls of one row


@dataclass(frozen=True)
class SparseInference:
    """How tickets run: a batch on how many threads, and on images of which side (pixels)."""

    threads: int
    side: int

    def open(self, source: bytes | str | os.PathLike[str]) -> SparseModule:
        """Return a ticket, the path of its file or its bytes, as a module."""
        from pipeline.inference import SparseNetwork  # here, because it needs llvmlite

        network = SparseNetwork(source)
        network.engine((3, self.side, self.side))  # compiled before anything is timed
        return SparseModule(network, self.threads)

    def latency(self, networks: Sequence[nn.Module]) -> Latency:
        """Time one image at a time (batch 1) through a network or an ensemble of several: processor time of one thread.

        Modules of sparse inference are called with arrays, others with tensors, as their users would.
        """
        image = np.random.default_rng(0).standard_normal((1, 3, self.side, self.side), np.float32)
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            found = in_turns({"": _leg(networks, image)}, NUM_CALLS, thread_ms, max_seconds=MAX_SECONDS)
            return Latency.of(found[""])
        finally:
            torch.set_num_threads(num_threads)


def _leg(networks: Sequence[nn.Module], image: Any) -> Callable[[], Any]:
    sparse = [network.network for network in networks if isinstance(network, SparseModule)]
    if len(sparse) == len(networks):
        from pipeline.inference import SparseEnsemble

        run = sparse[0] if len(sparse) == 1 else SparseEnsemble(sparse)
        return lambda: run(image)
    tensor = torch.from_numpy(image)

    def dense() -> Any:
        with torch.inference_mode():
            return [network(tensor) for network in networks]

    return dense


class SparseModule(nn.Module):
    """A ticket by sparse inference on the CPU, as a module without parameters and gradients."""

    def __init__(self, network: SparseNetwork, threads: int) -> None:
        super().__init__()
        self.network, self.threads = network, threads

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [images, classes] of images [images, channels, height, width] on any device."""
        given = images.float().cpu().contiguous().numpy()
        _, channels, height, width = given.shape
        logits = self.network.engine((channels, height, width))(given, self.threads)
        return torch.from_numpy(logits).to(images.device)
