"""Progressive resizing: small images first, as a function of the epoch."""

from __future__ import annotations

from pipeline.config.schema import DataConfig

MULTIPLE = 32  # sides of images in pixels: what convolutional networks halve five times


def resolution_of(epoch: int, data: DataConfig) -> int:
    """Side of a training image in pixels in this epoch, from 0.

    From ``first_resolution`` (0: there is no ramp) at epoch ``ramp_from`` linearly to
    ``train_resolution`` at epoch ``ramp_until``, rounded to a multiple of 32 in between.
    """
    if not data.first_resolution or epoch >= data.ramp_until:
        return data.train_resolution
    if epoch <= data.ramp_from:
        return data.first_resolution
    share = (epoch - data.ramp_from) / (data.ramp_until - data.ramp_from)
    side = data.first_resolution + share * (data.train_resolution - data.first_resolution)
    return min(max(MULTIPLE * round(side / MULTIPLE), data.first_resolution), data.train_resolution)
