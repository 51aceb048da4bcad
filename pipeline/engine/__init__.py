"""Engines run backward, average gradients and step the optimiser, with plain torch, DDP or DeepSpeed."""
