"""Activation statistics: second moments of layer inputs, gathered by forward hooks.

A window is everything between two optimizer steps (all micro-batches of one step). Sums and row
counts are kept apart until the step, so micro-batches and processes pool exactly. A window has
two piles: what was gathered since the last backward ("fresh") and what a backward has used
("used"). `zero_grad` without a step throws away the used pile alone, so that a step a GradScaler
skips leaves no trace whether `zero_grad` comes before the forward or between it and the backward.
"""

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from flowdopr.optim.layers import Case

_RUNNING: "weakref.WeakValueDictionary[int, Statistics]" = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


class Pile:
    """A sum of z z^T (G, B, s, s) with its number of rows; empty until something is added."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.count = 0

    def pour_into(self, other: "Pile") -> None:
        """Move everything into `other`."""
        if self.sums is not None:
            other.sums = self.sums if other.sums is None else other.sums.add_(self.sums)
            other.count += self.count
        self.sums, self.count = None, 0


class Statistic:
    """One Sigma: the layer case that feeds it, its piles, and its running average.

    `sigma` is the exponential average of the batch second moments and `weight` that of the ones,
    so `sigma / weight` is unbiased from the first refresh on. `transform` is T, made from it.
    """

    def __init__(self, name: str, case: Case, weight: Tensor, max_rows: int | None) -> None:
        self.name, self.case, self.max_rows = name, case, max_rows
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.parameter = weight
        self.fresh, self.used = Pile(), Pile()
        self.ran_outside_backward = False
        self.sigma: Tensor | None = None
        self.transform: Tensor | None = None
        self.weight = 0.0
        self.skipped_in_a_row = 0

    @property
    def device(self) -> torch.device:
        """Where the weight is now."""
        return self.parameter.device

    def gather(self, x: Tensor, case: Case) -> None:
        """Count one forward input, unless it is a recomputation of one already counted."""
        if torch._C._current_graph_task_id() != -1:  # a forward inside backward: checkpointing
            if self.ran_outside_backward:
                return
        else:
            self.ran_outside_backward = True
        pile = self.fresh
        if pile.sums is None:
            pile.sums = torch.zeros(self.case.shape, dtype=self.dtype, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            pile.count += case.accumulate(pile.sums, x, self.max_rows)

    def close(self) -> Pile:
        """End the window; returns all it gathered."""
        self.fresh.pour_into(self.used)
        whole, self.used, self.ran_outside_backward = self.used, Pile(), False
        return whole

    def average(self, batch: Tensor, cov_decay: float) -> None:
        """Sigma <- decay Sigma + (1 - decay) batch, in place."""
        sigma = torch.zeros_like(batch) if self.sigma is None else self.sigma
        self.sigma = sigma.mul_(cov_decay).add_(batch, alpha=1 - cov_decay)
        self.weight = cov_decay * self.weight + (1 - cov_decay)


class Hook:
    """The forward pre-hook of one module; inert once copied or unpickled."""

    def __init__(self, handle: int, index: int, token: Tensor | None) -> None:
        self.handle, self.index, self.token = handle, index, token

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.token is None or not module.training or not torch.is_grad_enabled():
            return
        x = (args[0] if args else kwargs["input"]).detach()
        if torch.compiler.is_compiling():
            torch.ops.flowdopr.gather(x, self.token, self.handle, self.index)
        else:
            _gather(x, self.handle, self.index)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return Hook(-1, self.index, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (-1, self.index, None)


def _gather(x: Tensor, handle: int, index: int) -> None:
    statistics = _RUNNING.get(handle)
    if statistics is not None:
        statistics.gather(index, x)


@torch.library.custom_op("flowdopr::gather", mutates_args=("token",))
def _gather_op(x: Tensor, token: Tensor, handle: int, index: int) -> None:
    """`_gather`, opaque to torch.compile: whether a step gathers is no guard of the graph."""
    _gather(x, handle, index)


@_gather_op.register_fake
def _gather_fake(x: Tensor, token: Tensor, handle: int, index: int) -> None:
    return None


class Statistics:
    """All Statistic of a model, their hooks, and the switch `gathering`."""

    def __init__(self) -> None:
        self.all: list[Statistic] = []
        self.gathering = True
        self._readers: list[tuple[Statistic, Case]] = []
        self._backward_ran = False
        self._handle = next(_HANDLES)
        self._removable: list[Any] = []
        _RUNNING[self._handle] = self

    def watch(
        self, module: nn.Module, weight: nn.Parameter, statistic: Statistic, case: Case
    ) -> None:
        """Feed `statistic` from `module`'s forward; note the arrival of `weight`'s gradient."""
        hook = Hook(self._handle, len(self._readers), torch.zeros(1, device=weight.device))
        self._readers.append((statistic, case))
        self._removable.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        reference = weakref.ref(self)

        def arrived(_: Tensor) -> None:
            statistics = reference()
            if statistics is not None:
                statistics._backward_ran = True

        self._removable.append(weight.register_post_accumulate_grad_hook(arrived))

    @torch.no_grad()
    def gather(self, index: int, x: Tensor) -> None:
        """One forward of the module watched as number `index`."""
        if self.gathering:
            self._settle()
            statistic, case = self._readers[index]
            statistic.gather(x, case)

    def close(self) -> list[Pile]:
        """End the window; returns what each statistic gathered, in order."""
        self._backward_ran = False
        return [statistic.close() for statistic in self.all]

    def discard(self) -> None:
        """Throw away what a backward has already used: its step was skipped."""
        self._settle()
        for statistic in self.all:
            statistic.used = Pile()
            statistic.ran_outside_backward = statistic.fresh.sums is not None

    def remove_hooks(self) -> None:
        """Take every hook off the model."""
        for removable in self._removable:
            removable.remove()
        self._removable.clear()
        _RUNNING.pop(self._handle, None)

    def _settle(self) -> None:
        if self._backward_ran:
            self._backward_ran = False
            for statistic in self.all:
                statistic.fresh.pour_into(statistic.used)
