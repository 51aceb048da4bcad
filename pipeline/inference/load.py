"""Load a ticket as a torch network, with its classes and the way in which its images are prepared.

Needs torch, numpy and safetensors; torchvision or timm if the network is theirs, Pillow to read
image files. numba makes cropping and resizing fast.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import models, parts
from pipeline.config.schema import DataConfig
from pipeline.errors import ConfigError, DataError
from pipeline.tickets import Provenance, Ticket, decode
from pipeline.tickets.place import read_ticket
from pipeline.tickets.provenance import require_parts

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.data.augment import Place
    from pipeline.data.bilinear import Box

    Picture = str | os.PathLike[str] | Image | NDArray[np.uint8] | Tensor

NEEDED = ("eval_resolution", "eval_ratio", "mean", "std")  # of PREPROCESSING, to prepare an image
BATCH = 256  # images that predict computes at once


def load_ticket(
    source: Ticket | bytes | str | os.PathLike[str],
    *,
    network: nn.Module | None = None,
    imports: Sequence[str] = (),
) -> TicketNetwork:
    """Load a ticket as a torch network in evaluation mode.

    For example::

        >>> network = load_ticket("fashion_mnist_s90")  # doctest: +SKIP
        >>> predict(network, "boot.png")  # doctest: +SKIP
        [[('Ankle boot', 0.9998)]]

    Args:
        source: a ticket file, or a folder of tickets or run (``runs/x``), for its last ticket, as a
            path or a URL that fsspec supports; the name of an entry of the zoo (``NAME``, or
            ``NAME/TICKET`` for another of its tickets); the bytes of a file; or a Ticket.
        network: a network of one's own class, which is given the ticket's weights; None: the one
            that ``pipeline.models`` builds by the name in the ticket.
        imports: packages to import first, which register models of one's own (docs/own-parts.md). A
            ticket may say which it needs, but never chooses what is imported.

    Raises:
        ConfigError: the name is unknown, or a library is not installed.
        DataError: the file does not exist, or does not fit its network.
        IntegrityError: the ticket is damaged.
        PermissionDenied: the file may not be read.
    """
    parts.import_parts(imports)
    if isinstance(source, str | os.PathLike):
        source = read_ticket(os.fspath(source))
    return TicketNetwork(source if isinstance(source, Ticket) else decode(source), network=network)


def predict(
    ticket: TicketNetwork | Ticket | bytes | str | os.PathLike[str],
    images: Sequence[Picture] | Picture,
    *,
    top: int = 1,
) -> list[list[tuple[str, float]]]:
    """Return the most probable classes of pictures, by name.

    Args:
        ticket: what :func:`load_ticket` takes or returns. Load it once for several calls.
        images: a picture or a list of them, as :meth:`TicketNetwork.preprocess` takes them.
        top: number of classes to return for each picture; at most all.

    Returns:
        For each picture, (name, probability) of its most probable classes, the most probable first.

    Raises:
        ConfigError, DataError, IntegrityError: as :func:`load_ticket` and :meth:`TicketNetwork.preprocess` do.
    """
    if top < 1:
        raise ConfigError(f"top: expected at least 1, got {top}")
    network = ticket if isinstance(ticket, TicketNetwork) else load_ticket(ticket)
    values, indices = network.predict(images).topk(min(top, len(network.classes)), dim=1)
    return [
        [(network.classes[index], value) for value, index in zip(*row, strict=True)]
        for row in zip(values.tolist(), indices.tolist(), strict=True)
    ]


class TicketNetwork(nn.Module):
    """The network of a ticket, on the CPU, in evaluation mode; pruned weights are 0.

    ``network(images)`` takes images as :meth:`preprocess` returns them, float32 [images, 3, height,
    width], and returns logits [images, classes]. It is an ordinary module: ``network.to("cuda")``
    moves it.

    Attributes:
        network: the module that the ticket was trained as.
        ticket: the ticket, with ``provenance``, ``masks``, ``density`` and ``content_digest``.
        transform: :meth:`preprocess`, for the ``transform`` of a data set.
        classes: names of the classes, in the order of the outputs; numbers as text if the ticket does
            not name them.
    """

    def __init__(self, ticket: Ticket, *, network: nn.Module | None = None) -> None:
        super().__init__()
        of, shapes = ticket.provenance, {name: tensor.shape for name, tensor in ticket.state.items()}
        whose = f"ticket {of.index} of {of.parent_run}"
        if network is None:
            require_parts(of, whose)
            network = models.build_for(shapes, of.model, num_classes=of.num_classes, args=of.model_args, whose=whose)
        models.require_shapes(network, shapes, of.model, whose=whose)
        self.network = network
        self.network.load_state_dict(ticket.state)
        self.ticket = ticket
        named = ticket.network.classes if ticket.network is not None else ()
        self.classes = (*named, *map(str, range(len(named), of.num_classes)))
        self.eval().requires_grad_(False)

    @property
    def transform(self) -> Callable[[Picture], Tensor]:
        """:meth:`preprocess`, by the name that data sets have for it."""
        return self.preprocess

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [images, classes] of prepared images [images, 3, height, width]."""
        return torch.as_tensor(self.network(images))

    @property
    def provenance(self) -> Provenance:
        """Where the ticket comes from: model, method, step, seed, digests, …."""
        return self.ticket.provenance

    @property
    def resolution(self) -> int:
        """Height and width, in pixels, of the images that the network was evaluated on."""
        return int(self._preparation().eval_resolution)

    @torch.no_grad()
    def predict(self, images: Sequence[Picture] | Picture) -> Tensor:
        """Return the probabilities [images, classes] of a picture or a list of them.

        Args:
            images: what :meth:`preprocess` takes.

        Raises:
            ConfigError, DataError: as :meth:`preprocess` does.
        """
        pictures: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        device = next(self.network.parameters()).device
        outputs = [torch.empty(0, len(self.classes))]
        for start in range(0, len(pictures), BATCH):
            batch = torch.stack([self.preprocess(picture) for picture in pictures[start : start + BATCH]])
            outputs.append(self(batch.to(device)).float().softmax(dim=1).cpu())
        return torch.cat(outputs)

    def preprocess(self, image: Picture) -> Tensor:
        """Prepare a picture as the evaluation of the ticket does: crop its centre, resize it, normalise its colours.

        Args:
            image: the path of a JPEG or PNG, a Pillow image, or an array or tensor of levels from 0 to
                255, uint8 [height, width, 3], or [height, width] if it is grey.

        Returns:
            float32 [3, resolution, resolution].

        Raises:
            ConfigError: the ticket does not say how its images are prepared, or a library is not
                installed.
            DataError: this is not a picture, or the file cannot be read.
        """
        data = self._preparation()
        mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (data.mean, data.std))
        square = torch.tensor(_centre(_levels(image), data)).permute(2, 0, 1)
        return square.to(torch.float32).sub_(mean).div_(std)

    def _preparation(self) -> DataConfig:
        stated = self.provenance.preprocessing
        if missing := [key for key in NEEDED if key not in stated]:
            raise ConfigError(
                f"the ticket does not say how images are prepared (data.{missing[0]} is missing)",
                do="prepare them as its configuration says, and call the network itself",
            )
        known = {key: stated[key] for key in (*NEEDED, "eval_resize") if key in stated}
        return DataConfig(train="", val="", **known)

    def extra_repr(self) -> str:
        """Return the ticket in a few words, for ``print(network)``."""
        of = self.provenance
        return f"ticket {of.index} of {of.parent_run}: {of.model}, {of.method}, density {self.ticket.density:.4f}"


def _levels(image: Picture) -> NDArray[np.uint8]:
    """Return the levels of a picture, uint8 [height, width, 3]."""
    if isinstance(image, str | os.PathLike):
        with _needs("PIL", "pillow", "to read image files"):
            from pipeline.datasets.image_file import BadImage, ImageFile, decode_rgb, read_content
        try:
            return decode_rgb(read_content(ImageFile(Path(image).expanduser())))
        except BadImage as error:
            raise DataError(f"{image}: {error}", do="pass a JPEG or PNG") from None
    if hasattr(image, "convert"):
        return np.asarray(image.convert("RGB"))
    values: Any = image.cpu().numpy() if isinstance(image, Tensor) else image
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8:
        found = f"{values.dtype} values" if isinstance(values, np.ndarray) else type(image).__name__
        raise DataError(
            f"image: expected levels from 0 to 255 of type uint8, a Pillow image or a path, got {found}",
            do="convert it with (image * 255).round().astype('uint8') if its values are from 0 to 1",
        )
    if values.ndim == 2:
        values = np.repeat(values[:, :, None], 3, axis=2)
    if values.ndim != 3 or values.shape[2] != 3 or not values.size:
        raise DataError(
            f"image: expected the shape [height, width, 3] or [height, width], got {list(values.shape)}",
            do="put the channels last, and pass several images as a list",
        )
    return np.ascontiguousarray(values)


def _centre(levels: NDArray[np.uint8], data: DataConfig) -> NDArray[np.uint8]:
    """Return the centre of a picture at the resolution of the evaluation, by the functions that the loaders use."""
    side, size = data.eval_resolution, (levels.shape[0], levels.shape[1])
    if size == (side, side) and int(data.eval_ratio * side) == side:
        return levels
    box, place = _functions(side, data.eval_ratio, data.eval_resize)
    out = np.empty((side, side, 3), np.uint8)
    stream = np.uint64(0)  # evaluation draws nothing
    place(levels, (0, 0), size, box(*size, stream), stream, False, out)
    return out


@functools.cache
def _functions(eval_resolution: int, eval_ratio: float, eval_resize: str) -> tuple[Box, Place]:
    """Return what finds the part of a picture that is needed, and what resizes it; compiling takes a second."""
    from pipeline.data.augment import evaluation_augmentation, place_of

    stated = {"eval_resolution": eval_resolution, "eval_ratio": eval_ratio, "eval_resize": eval_resize}
    augmentation = evaluation_augmentation(DataConfig(train="", val="", **stated))  # type: ignore[arg-type]
    return augmentation.box, place_of(augmentation)


@contextlib.contextmanager
def _needs(module: str, package: str, why: str) -> Iterator[None]:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{package} is needed {why} and not installed", do=f"python -m pip install {package}"
        ) from error
    yield
