"""Averages of the weights, updated during training by the rules of `runs.averages`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowdopr.linalg import local
from flowdopr.runs import OWN, Average


class EMA:
    """Averages of a model's floating-point weights and buffers, one for each rule.

    Other buffers, such as integers, are copied.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> ema = EMA(model, [Average(length=0.1), Average(decay=0.999)])
    >>> for step in (1, 2, 3):  # after each optimizer step, from 1
    ...     _ = nn.init.constant_(model.weight, float(step))
    ...     ema.update(step)
    >>> with ema.applied(model):  # the model has the weights of the first average in here
    ...     print(f"{model.weight.item():.2f}")
    2.96
    >>> model.weight.item()
    3.0
    """

    def __init__(self, model: nn.Module, averages: Sequence[Average]):
        self.averages = list(averages)
        self.live = {name: value.detach() for name, value in model.state_dict().items()}
        self.values = {
            average.name: {name: value.clone() for name, value in self.live.items()}
            for average in self.averages
        }
        self._moving = [name for name, value in self.live.items() if value.is_floating_point()]
        self._others = [name for name in self.live if name not in set(self._moving)]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update all averages after optimizer step number `step` (from 1)."""
        live = [local(self.live[name]) for name in self._moving]
        for average in self.averages:
            values = self.values[average.name]
            for name in self._others:
                values[name].copy_(self.live[name])
            moving = [local(values[name]) for name in self._moving]
            torch._foreach_lerp_(moving, live, 1.0 - average.keep(step))

    def load(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Set the average called `name` to `values`, in place."""
        for key, value in values.items():
            self.values[name][key].copy_(value)

    def state_dicts(self) -> dict[str, dict[str, Tensor]]:
        """The state dict of every average, by its name."""
        return self.values

    @contextmanager
    @torch.no_grad()
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Give `model` the weights of the first average within the block, and its own after it."""
        average = self.values[self.averages[0].name]
        with _restored(self.live):
            for name, value in self.live.items():
                value.copy_(average[name])
            yield model


class OwnAverage(EMA):
    """The one average that an optimizer keeps itself (`optim.averages_itself`).

    A schedule-free optimizer moves y of x and z, and x, the average of all z, is what it shows in
    its evaluation mode. Going there and back changes y by rounding, so y is put back exactly.
    """

    def __init__(self, model: nn.Module, optimizer: Any):
        super().__init__(model, ())
        self.model, self.optimizer = model, optimizer

    def state_dicts(self) -> dict[str, dict[str, Tensor]]:
        """A copy of the average, by its name."""
        with self.applied(self.model):
            return {OWN: {name: value.clone() for name, value in self.live.items()}}

    @contextmanager
    @torch.no_grad()
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Give `model` the averaged weights within the block, and the trained ones after it."""
        with _restored(self.live):
            self.optimizer.eval()
            try:
                yield model
            finally:
                self.optimizer.train()


@contextmanager
def _restored(live: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the tensors may change; after it they are bitwise what they were."""
    own = {name: value.clone() for name, value in live.items()}
    try:
        yield
    finally:
        for name, value in live.items():
            value.copy_(own[name])
