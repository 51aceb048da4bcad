"""Typed configuration: the schema, reading, checking and loading."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.lazy import lazy_exports

if TYPE_CHECKING:
    from pipeline.config.load import load_config
    from pipeline.config.schema import Config

__all__ = ["Config", "load_config"]

__getattr__ = lazy_exports(
    __name__,
    {
        "Config": "pipeline.config.schema",
        "load_config": "pipeline.config.load",
    },
)
