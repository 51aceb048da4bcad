"""Progressive resizing: the size of training images grows with the epoch."""

from __future__ import annotations

from pipeline.config.schema import DataConfig

MULTIPLE = 32  # pixels: convolutional networks halve the side of an image five times


def resolution_of(epoch: int, data: DataConfig) -> int:
    """Return the side of training images, in pixels, in an epoch counted from 0.

    It grows linearly from ``first_resolution`` (0: no ramp) at epoch ``ramp_from`` to
    ``train_resolution`` at epoch ``ramp_until``, rounded to a multiple of 32 in between.
    """
    if not data.first_resolution or epoch >= data.ramp_until:
        return data.train_resolution
    if epoch <= data.ramp_from:
        return data.first_resolution
    share = (epoch - data.ramp_from) / (data.ramp_until - data.ramp_from)
    side = data.first_resolution + share * (data.train_resolution - data.first_resolution)
    return min(max(MULTIPLE * round(side / MULTIPLE), data.first_resolution), data.train_resolution)


def resolutions(data: DataConfig, num_epochs: int) -> list[int]:
    """Return every side of images, in pixels, that ``num_epochs`` epochs train with or BatchNorm is recalibrated with.

    The last is ``train_resolution``, which recalibration uses even if training does not reach it.
    """
    ramp = range(data.ramp_from, min(data.ramp_until, num_epochs)) if data.first_resolution else ()
    return sorted({*(resolution_of(epoch, data) for epoch in (0, *ramp)), data.train_resolution})
