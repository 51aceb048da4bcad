"""Compile what trains with ``torch.compile`` (``train.compile``): forward and backward pass, not the optimiser.

The compiled module is beside the network, not in its place: names, weights, masks, checkpoints and
evaluation are those of the network itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pipeline.errors import ConfigError

# Of the images that one network may train on, such as those of progressive resizing. Each is compiled for itself: code
# for any shape is slower, and whether it is made would depend on where a run was resumed, and with it the last bits.
NUM_SHAPES = 64


def compiled(model: nn.Module) -> nn.Module:
    """Return ``model`` compiled with inductor, at its first call; it has the same parameters."""
    import torch._dynamo.config as dynamo  # here, because it takes a second
    import torch._inductor.config as inductor

    dynamo.recompile_limit = max(dynamo.recompile_limit, NUM_SHAPES)
    dynamo.fail_on_recompile_limit_hit = True  # in place of going on without compiling, which changes the last bits
    if torch.are_deterministic_algorithms_enabled() and hasattr(inductor, "deterministic"):
        inductor.deterministic = True  # kernels are not chosen by measuring them
    module: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    return module


@contextmanager
def compiling() -> Iterator[None]:
    """Name the key in an error of the compiler, which works within the first steps.

    Raises:
        ConfigError: torch cannot compile the network on this machine.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_compiler(error):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"train.compile: torch cannot compile the network: {type(error).__name__}: {reason[:300]}",
            do="install a C++ compiler (on GPUs also triton, which comes with torch), or set train.compile=false",
        ) from error


def _is_of_compiler(error: Exception) -> bool:
    return any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__)
