"""Exponential moving average of a model's weights, the weights that are sampled from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averages the floating-point entries of a state dict; others are copied.

    After optimizer step k (from 1) the average moves by `1 - min(decay, (1 + k) / (10 + k))`, so
    that the random initial weights are forgotten even when the run is short.

        ema = EMA(model, decay=0.999)
        ema.update(step)          # after each optimizer step
        with ema.applied(model):  # the model computes with averaged weights in here
            ...
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.live = {name: value.detach() for name, value in model.state_dict().items()}
        self.average = {name: value.clone() for name, value in self.live.items()}
        moving = [name for name, value in self.live.items() if value.is_floating_point()]
        self._live = [self.live[name] for name in moving]
        self._average = [self.average[name] for name in moving]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._live, 1.0 - decay)

    def load(self, average: dict[str, Tensor]) -> None:
        """Take over averaged weights by name, in place."""
        for name, value in average.items():
            self.average[name].copy_(value)

    @contextmanager
    @torch.no_grad()
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """`model` with averaged weights inside the block and its own again after it."""
        own = {name: value.clone() for name, value in self.live.items()}
        try:
            for name, value in self.live.items():
                value.copy_(self.average[name])
            yield model
        finally:
            for name, value in self.live.items():
                value.copy_(own[name])
