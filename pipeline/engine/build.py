"""Build the configured engine."""

from __future__ import annotations

from torch import nn

from pipeline.config.schema import TrainConfig
from pipeline.distributed import session
from pipeline.distributed.session import Stopwatch
from pipeline.engine.protocol import Engine
from pipeline.engine.torch_engine import DistributedDataParallelEngine, TorchEngine


def build_engine(model: nn.Module, config: TrainConfig, *, waiting: Stopwatch | None = None) -> Engine:
    """Put ``model`` on this rank's device and wrap it in the configured engine.

    Args:
        model: its weights must be equal on all ranks.
        config: the section ``train`` of the configuration.
        waiting: measures how long the engine waits for other ranks.
    """
    model = model.to(session.device())
    if config.engine != "deepspeed":
        return (DistributedDataParallelEngine if config.engine == "ddp" else TorchEngine)(model, config, waiting)
    from pipeline.engine.deepspeed_engine import DeepSpeedEngine, ShardedDeepSpeedEngine

    return (ShardedDeepSpeedEngine if config.zero_stage == 1 else DeepSpeedEngine)(model, config, waiting)
