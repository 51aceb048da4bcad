"""Engines: backward, averaged gradients and the optimiser step, by plain torch, DDP or DeepSpeed."""
