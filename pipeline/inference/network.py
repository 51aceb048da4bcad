"""The public face: a ticket as a function from images to logits."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import ConfigError, DataError
from pipeline.inference.build import build_engine
from pipeline.inference.engine import Engine
from pipeline.inference.jit import host
from pipeline.models import image_size, outline_for
from pipeline.tickets import Ticket, decode

if TYPE_CHECKING:
    Array = npt.NDArray[np.float32]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """How one convolution or linear layer runs."""

    name: str
    shape: tuple[int, ...]  # of its weight
    density: float  # of the weights that the kernel reads
    how: str  # rows × vectors of a tile, and blocks of input channels
    num_bytes: int  # of the packed weights


class SparseNetwork:
    """A ticket that runs on the CPU with its active weights only, in fp32.

    ``network(images)`` takes images [N, C, H, W], float32, as a torch tensor or a numpy array, normalised as
    in training, and returns logits [N, classes] of the same kind. Several threads may call it at once, and a
    forked process may go on calling it. The first call with images of another size compiles for that size.

    Args:
        source: path of a ticket, its bytes, or the ticket.
        threads: that one call may use.
        is_tuned: measure, the first time, how each layer runs fastest on this machine; the result is cached.
        lanes: floats in a vector, for tests; 0: as the processor has them.

    Raises:
        IntegrityError: the ticket is damaged.
        DataError: the file does not exist, or does not fit its network.
        ConfigError: the network cannot be built.
    """

    def __init__(
        self,
        source: Ticket | bytes | str | os.PathLike[str],
        *,
        threads: int = 1,
        is_tuned: bool = True,
        lanes: int = 0,
    ) -> None:
        if type(threads) is not int or threads < 1:
            raise ConfigError(f"threads: expected a whole number from 1 on, got {threads!r}")
        self._source = source
        ticket = self._read()
        self.provenance, self.threads = ticket.provenance, threads
        of, shapes = ticket.provenance, {name: tensor.shape for name, tensor in ticket.state.items()}
        whose = f"ticket {of.index} of {of.parent_run}"
        self._outline = outline_for(shapes, of.model, num_classes=of.num_classes, args=of.model_args, whose=whose)
        self._digest = ticket.content_digest
        self.is_tuned = is_tuned
        self._processor = host(lanes)
        self._engines: dict[tuple[int, int, int], Engine] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()

    @overload
    def __call__(self, images: Tensor) -> Tensor: ...
    @overload
    def __call__(self, images: Array) -> Array: ...
    def __call__(self, images: Tensor | Array) -> Tensor | Array:
        """Return the logits [N, classes] of images [N, C, H, W].

        Raises:
            ConfigError: these are not images, or not of a size that the network takes.
            DataError, IntegrityError: the file of the ticket was replaced or damaged before this size of image came.
        """
        given = _as_array(images)
        output = self.engine((given.shape[1], given.shape[2], given.shape[3]))(given, self.threads)
        return torch.from_numpy(output) if isinstance(images, Tensor) else output

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images that the ticket was trained for."""
        of = self.provenance
        side = of.preprocessing.get("eval_resolution") or image_size(of.model)
        return 3, side, side

    @property
    def layers(self) -> list[LayerReport]:
        """How each layer runs on images of :attr:`image_shape`."""
        return [
            LayerReport(
                layer.step.name,
                layer.shape,
                layer.density,
                f"{layer.choice.group}×{layer.choice.vectors}, {layer.choice.blocks} blocks",
                layer.packed.num_bytes if layer.packed is not None else 0,
            )
            for layer in self.engine(self.image_shape).program.layers
        ]

    @property
    def on_torch(self) -> dict[str, int]:
        """Operators that torch computes, with their number, for images of :attr:`image_shape`."""
        return dict(self.engine(self.image_shape).torch_counts)

    @property
    def num_bytes(self) -> int:
        """Memory of the packed network for images of :attr:`image_shape`, without activations."""
        engine = self.engine(self.image_shape)
        return engine.program.num_bytes + sum(tensor.nbytes for tensor in engine.held.values())

    def _read(self) -> Ticket:
        # read again for other image sizes: unpacked, a ticket takes ten times the memory of its file
        return self._source if isinstance(self._source, Ticket) else decode(self._source)

    def engine(self, shape: tuple[int, int, int]) -> Engine:
        """Return what runs images of a shape; compiled when it is first asked for."""
        if (found := self._engines.get(shape)) is not None:
            return found
        if self._process != os.getpid():  # another thread may have held the lock when this process was forked
            self._lock, self._process = threading.Lock(), os.getpid()
        with self._lock:
            if shape not in self._engines:
                self._engines[shape] = self._compile(shape)
        return self._engines[shape]

    def _compile(self, shape: tuple[int, int, int]) -> Engine:
        ticket, of = self._read(), self.provenance
        if ticket.content_digest != self._digest:
            raise DataError(f"{self._source!r}: is another ticket than when it was opened", do="open it again")
        sizes = "x".join(map(str, shape))
        tuning = f"{self._processor.key}-{self._digest[:24]}-{sizes}-{self.threads}"
        engine = build_engine(
            self._outline,
            shape,
            ticket.state,
            ticket.masks,
            processor=self._processor,
            threads=self.threads,
            tuning=tuning if self.is_tuned else "",
        )
        if engine.torch_counts:
            counts = ", ".join(f"{name} ({number})" for name, number in engine.torch_counts.most_common())
            logger.warning("%s: these operators stay on torch: %s", of.model, counts)
        return engine


class SparseEnsemble:
    """The mean of the softmax of several tickets, which run one after the other over the whole batch.

    Args:
        sources: paths of tickets, or :class:`SparseNetwork`; of any networks with the same classes.
        threads: that one call may use.
    """

    def __init__(self, sources: Iterable[SparseNetwork | Ticket | str | os.PathLike[str]], *, threads: int = 1) -> None:
        self.networks: Sequence[SparseNetwork] = [
            each if isinstance(each, SparseNetwork) else SparseNetwork(each, threads=threads) for each in sources
        ]
        if not self.networks:
            raise ConfigError("an ensemble needs at least one ticket")
        classes = {each.provenance.num_classes for each in self.networks}
        if len(classes) > 1:
            raise ConfigError(f"the tickets of an ensemble have different numbers of classes: {sorted(classes)}")

    @overload
    def __call__(self, images: Tensor) -> Tensor: ...
    @overload
    def __call__(self, images: Array) -> Array: ...
    def __call__(self, images: Tensor | Array) -> Tensor | Array:
        """Return the mean probabilities [N, classes] of images [N, C, H, W]."""
        given = _as_array(images)
        logits = torch.stack([torch.from_numpy(network(given)) for network in self.networks])
        mean = logits.softmax(-1).mean(0)
        return mean if isinstance(images, Tensor) else mean.numpy()


def _as_array(images: Tensor | Array) -> Array:
    if isinstance(images, Tensor):
        images = images.detach()
        if images.device.type != "cpu" or images.dtype != torch.float32:
            raise ConfigError(f"images: expected float32 on the CPU, got {images.dtype} on {images.device}")
        images = images.contiguous().numpy()
    if not isinstance(images, np.ndarray) or images.dtype != np.float32:
        raise ConfigError(f"images: expected float32, got {getattr(images, 'dtype', type(images).__name__)}")
    if images.ndim != 4:
        raise ConfigError(f"images: expected the shape [N, C, H, W], got {list(images.shape)}")
    return np.ascontiguousarray(images)
