"""From a network and its tensors to an engine."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from pipeline.inference.engine import Engine
from pipeline.inference.expand import expand
from pipeline.inference.jit import Processor
from pipeline.inference.kernel_set import library
from pipeline.inference.lower import lower
from pipeline.inference.program import Program
from pipeline.inference.trace import list_operators
from pipeline.inference.tune import tune


def build_engine(
    model: nn.Module,
    shape: tuple[int, int, int],
    state: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    processor: Processor,
    threads: int,
    tuning: str = "",
) -> Engine:
    """List, lower, pack and compile a network.

    Args:
        model: the network on the meta device.
        shape: (channels, height, width) of the images.
        state: its tensors.
        masks: of its sparse weights; a weight without one is sparse where it is 0.
        processor: this one.
        threads: that one image is shared among.
        tuning: under which layers' measured choices are cached; empty: nothing is measured.

    Raises:
        ConfigError: the network does not take such images, or its operators cannot be listed.
    """
    graph = lower(list_operators(model, shape), state, masks)
    program = Program(expand(graph), state, masks, width=processor.width, threads=threads)
    kernels = library(processor, program.needed)
    program.link(kernels)
    engine = Engine(graph, program, kernels, state)
    if tuning:
        tune(program, engine.measured_run(), key=tuning)
    program.seal()
    return engine
