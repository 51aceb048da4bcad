"""From operators to operations: BatchNorm, sums and limits go into the convolutions before them.

What is not in :data:`pipeline.inference.rules.RULES` stays on torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.inference.graph import Graph
from pipeline.inference.lowering import Lowering
from pipeline.inference.rules import RULES
from pipeline.inference.trace import Listing


def lower(listing: Listing, state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Graph:
    """Turn a list of operators into steps.

    Args:
        listing: of the network.
        state: its tensors; weights of convolutions and linear layers are only named in the result.
        masks: of its sparse weights.
    """
    lowering = Lowering(listing, state, masks)
    for operator in listing.operators:
        rule = RULES.get(operator.name)
        if rule is None or not rule(lowering, operator):
            lowering.leave(operator)
    return lowering.finish()
