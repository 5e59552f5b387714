"""Activation statistics: second moments of layer inputs, gathered by forward hooks.

A window is everything between two optimizer steps (all micro-batches of one step). Sums and row
counts are kept apart until the step, so micro-batches and processes pool exactly. A window has
two piles: what was gathered since the last backward ("fresh") and what a backward has used
("used"). `zero_grad` without a step throws away the used pile alone, so that a step a GradScaler
skips leaves no trace whether `zero_grad` comes before the forward or between it and the backward.
"""

import itertools
import logging
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from flowdopr.optim.dual import DualCase
from flowdopr.optim.layers import Case
from flowdopr.optim.world import agreed

logger = logging.getLogger("flowdopr.optim")
_RUNNING: "weakref.WeakValueDictionary[int, Statistics]" = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


class Pile:
    """A sum of z z^T (G, B, s, s) with its number of rows; empty until something is added.

    Of the dual form it holds the rows themselves. Where rows were left out, those kept are scaled
    to stand for all, and all are counted.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.sums: Tensor | None = None
        self.count = 0

    def pour_into(self, other: "Pile") -> None:
        """Move everything into `other`."""
        if self.sums is not None:
            both = None if other.sums is None else self.case.join(other.sums, self.sums)
            other.sums = self.sums if both is None else both
            other.count += self.count
        self.sums, self.count = None, 0


class Statistic:
    """One Sigma: the layer case that feeds it, its piles, and its running average.

    `sigma` is the exponential average of the batch second moments and `weight` that of the ones,
    so `sigma / weight` is a weighted mean from the first refresh on, of which there have been
    `refreshes`. `transform` is T, made from it.
    A statistic with a `twin` keeps nothing of its own: the twin's modules see the same tensors.
    """

    def __init__(self, name: str, case: Case, weight: Tensor, max_rows: int | None) -> None:
        self.name, self.case, self.max_rows = name, case, max_rows
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.parameter = weight
        self.fresh, self.used = Pile(case), Pile(case)
        self.sigma: Tensor | None = None
        self.transform: Tensor | None = None
        self.twin: Statistic | None = None
        self.sources: list[Statistic | None] = []  # whose input each call had, until paired
        self.weight, self.refreshes = 0.0, 0
        self.skipped_in_a_row = 0

    @property
    def device(self) -> torch.device:
        """Where the weight is now."""
        return self.parameter.device

    @property
    def is_dual(self) -> bool:
        """Whether this keeps rows, Z / sqrt(n) (G, 1, n, d) in `sigma`, not second moments."""
        return isinstance(self.case, DualCase)

    @property
    def key(self) -> tuple[object, ...]:
        """Statistics of equal keys make the same Sigma of the same input."""
        return (*self.case.key, self.dtype, self.max_rows)

    def gather(self, x: Tensor, case: Case) -> None:
        """Add one forward input."""
        pile = self.fresh
        if pile.sums is None:
            pile.sums = torch.zeros(self.case.shape, dtype=self.dtype, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            pile.sums, count = case.gather(pile.sums, x, self.max_rows)
        pile.count += count

    def close(self) -> Pile:
        """End the window; returns all it gathered."""
        self.fresh.pour_into(self.used)
        whole, self.used = self.used, Pile(self.case)
        return whole

    def take(self, pile: Pile, cov_decay: float) -> None:
        """Sigma <- decay_k Sigma + (1 - decay_k) batch, in place; of the dual form the batch alone.

        At this layer's refresh k, from 0, decay_k = min(cov_decay, (1 + k) / (10 + k)): inputs
        change fastest at the start of training, and a long memory of them would mislead.
        """
        assert pile.sums is not None
        if self.is_dual:
            self.sigma, self.weight = pile.sums.div_(pile.count**0.5), 1.0
            self.refreshes += 1
            return
        batch = pile.sums.div_(pile.count)
        decay = min(cov_decay, (1 + self.refreshes) / (10 + self.refreshes))
        sigma = torch.zeros_like(batch) if self.sigma is None else self.sigma
        self.sigma = sigma.mul_(decay).add_(batch, alpha=1 - decay)
        self.weight = decay * self.weight + (1 - decay)
        self.refreshes += 1


def is_recomputation() -> bool:
    """Whether a forward running now repeats, for checkpointing, one that was counted.

    Inside a backward, reentrant checkpointing runs a forward for the first time with gradients, by
    a node of its own; the other kind repeats what a layer's own node wants to have again.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    node = torch._C._current_autograd_node()
    return node is None or node.name() != "CheckpointFunctionBackward"


class Hook:
    """The forward pre-hook of one module; inert once copied or unpickled."""

    def __init__(self, handle: int, index: int, token: Tensor | None) -> None:
        self.handle, self.index, self.token = handle, index, token

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.token is None or not module.training or not torch.is_grad_enabled():
            return
        x = args[0] if args else kwargs["input"]
        if torch.compiler.is_compiling():
            torch.ops.flowdopr.gather(x.detach(), self.token, self.handle, self.index)
        elif not is_functorch_wrapped_tensor(x):  # inside torch.func
            _gather(x, self.handle, self.index, traced=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return Hook(-1, self.index, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (-1, self.index, None)


def _gather(x: Tensor, handle: int, index: int, *, traced: bool) -> None:
    statistics = _RUNNING.get(handle)
    if statistics is not None:
        statistics.gather(index, x, traced)


@torch.library.custom_op("flowdopr::gather", mutates_args=("token",))
def _gather_op(x: Tensor, token: Tensor, handle: int, index: int) -> None:
    """`_gather`, opaque to torch.compile: whether a step gathers is no guard of the graph."""
    _gather(x, handle, index, traced=True)


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
        self.pairing = True
        self._parted: set[str] = set()
        self._last_inputs: dict[tuple[object, ...], tuple[weakref.ref[Tensor], Statistic]] = {}
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
    def gather(self, index: int, x: Tensor, traced: bool) -> None:
        """One forward of the module watched as number `index`."""
        if not self.gathering or is_recomputation():
            return
        self._settle()
        statistic, case = self._readers[index]
        if statistic.twin is None:
            statistic.gather(x.detach(), case)
        if not traced:
            self._compare_input(statistic, x)

    def pair(self) -> None:
        """After the first refresh window: let statistics that saw the same tensors share one.

        All ranks must have seen the same. Under torch.compile tensors have no identity, and every
        module keeps a statistic of its own.
        """
        if not self.pairing:
            return
        self.pairing = False
        leaders = []
        for statistic in self.all:
            leader = statistic.sources[0] if statistic.sources else None
            same = leader is not None and statistic.sources == [leader] * len(leader.sources)
            leaders.append(self.all.index(leader) if leader is not None and same else -1)
        for statistic, leader in zip(self.all, agreed(leaders, self.all[0].device), strict=True):
            statistic.twin = self.all[leader] if leader >= 0 else None
            statistic.sources.clear()
        for statistic in self.all:
            if statistic.twin is not None and statistic.twin.twin is not None:
                statistic.twin = statistic.twin.twin

    def part(self) -> None:
        """Give a statistic that was fed another tensor than its twin one of its own.

        It goes on from the twin's average, which its next refresh all but forgets.
        """
        twins = [statistic for statistic in self.all if statistic.twin is not None]
        if not twins:
            return
        parted = agreed([int(s.name in self._parted) for s in twins], twins[0].device)
        for statistic, apart in zip(twins, parted, strict=True):
            twin = statistic.twin
            if apart == 0 or twin is None:  # -1: on some ranks only
                continue
            statistic.twin, statistic.transform = None, twin.transform
            statistic.sigma = None if twin.sigma is None else twin.sigma.clone()
            statistic.weight, statistic.refreshes = twin.weight, 0

    def close(self) -> list[Pile]:
        """End the window; returns what each statistic gathered, in order."""
        self._backward_ran = False
        return [statistic.close() for statistic in self.all]

    def discard(self) -> None:
        """Throw away what a backward has already used: its step was skipped."""
        self._settle()
        for statistic in self.all:
            statistic.used = Pile(statistic.case)

    def remove_hooks(self) -> None:
        """Take every hook off the model."""
        for removable in self._removable:
            removable.remove()
        self._removable.clear()
        _RUNNING.pop(self._handle, None)

    def _compare_input(self, statistic: Statistic, x: Tensor) -> None:
        """Note whose input `x` was before; say so if a twin's is no longer its twin's."""
        last = self._last_inputs.get(statistic.key)
        source = last[1] if last is not None and last[0]() is x else None
        if source is None or source is statistic:
            self._last_inputs[statistic.key] = (weakref.ref(x), statistic)
            source = None
        if self.pairing:
            statistic.sources.append(source)
        elif statistic.twin is not source and statistic.name not in self._parted:
            self._parted.add(statistic.name)
            if statistic.twin is not None:
                logger.warning(
                    "layer %s: no longer fed the tensor of %s, whose statistics it used so far",
                    statistic.name,
                    statistic.twin.name,
                )

    def _settle(self) -> None:
        if self._backward_ran:
            self._backward_ran = False
            for statistic in self.all:
                statistic.fresh.pour_into(statistic.used)
