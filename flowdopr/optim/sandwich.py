"""The Cholesky sandwich: a step of the GP in the frame in which z is white, seen from outside."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowdopr.optim.plan import Layer
from flowdopr.optim.world import local


def step_sandwich(optimizer: torch.optim.Optimizer, ready: Sequence[tuple[Layer, Tensor]]) -> None:
    """W <- (1 - lr wd) W - lr GP(G L^-T) L^-1.

    The GP steps from W = 0, where its weight decay does nothing and what it leaves is its
    direction, exactly.
    """
    held = [[p.clone() for p in layer.parameters] for layer, _ in ready]
    for layer, _ in ready:
        for parameter in layer.parameters:
            parameter.zero_()
    try:
        optimizer.step()
    except BaseException:
        for (layer, _), before in zip(ready, held, strict=True):
            for parameter, old in zip(layer.parameters, before, strict=True):
                parameter.copy_(old)
        raise
    kept = {
        id(p): 1 - group["lr"] * group.get("weight_decay", 0.0)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for (layer, transform), before in zip(ready, held, strict=True):
        moved = layer.case.multiply([local(p) for p in layer.parameters], transform.mT)
        for parameter, old, move in zip(layer.parameters, before, moved, strict=True):
            parameter.copy_(old.mul_(kept[id(parameter)]))
            local(parameter).add_(move)
