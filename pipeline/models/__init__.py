"""Networks by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.lazy import lazy_exports

if TYPE_CHECKING:
    from pipeline.models.registry import (
        BuiltAs,
        build,
        build_for,
        built_as,
        image_size,
        outline,
        outline_for,
        require_shapes,
    )

__all__ = ["BuiltAs", "build", "build_for", "built_as", "image_size", "outline", "outline_for", "require_shapes"]

__getattr__ = lazy_exports(
    __name__,
    {
        "BuiltAs": "pipeline.models.registry",
        "built_as": "pipeline.models.registry",
        "build": "pipeline.models.registry",
        "build_for": "pipeline.models.registry",
        "image_size": "pipeline.models.registry",
        "outline": "pipeline.models.registry",
        "outline_for": "pipeline.models.registry",
        "require_shapes": "pipeline.models.registry",
    },
)
