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
from torch._C._functorch import peek_interpreter_stack

from flowdopr.optim.layers import Case
from flowdopr.optim.moments import Pile, Statistic
from flowdopr.optim.record import Later, Record, vector
from flowdopr.optim.world import agreed, summed, world_size

logger = logging.getLogger("flowdopr.optim")
_RUNNING: "weakref.WeakValueDictionary[int, Statistics]" = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


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
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided:
            return  # nothing with rows of z: the layer is reported as unseen
        if torch.compiler.is_compiling():
            torch.ops.flowdopr.gather(x.detach(), self.token, self.handle, self.index)
        elif peek_interpreter_stack() is None:  # not inside torch.func
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
        self._ballot: tuple[list[str], Later] | None = None
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
        if not statistic.parameter.requires_grad:  # frozen for a while, as a discriminator is
            return
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
        for statistic in self._parted_twins():
            twin = statistic.twin
            assert twin is not None
            statistic.twin, statistic.transform = None, twin.transform
            statistic.sigma = None if twin.sigma is None else twin.sigma.clone()
            if twin.record is not None:
                numbers, none = Record(*twin.record), torch.zeros_like(twin.record[0])
                own = Record(numbers.weight, none, none, none, numbers.damping, none)
                statistic.record = own.table()

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

    def _parted_twins(self) -> list[Statistic]:
        """On several ranks one that noticed is enough, and all know of it a refresh later."""
        twins = [statistic for statistic in self.all if statistic.twin is not None]
        voted = self.voted()
        self._ballot = None
        if world_size() == 1:
            voted = [*voted, *self._parted]
        elif twins:
            own = vector([statistic.name in self._parted for statistic in twins], twins[0].device)
            self._ballot = [statistic.name for statistic in twins], Later(summed([own])[0])
        return [statistic for statistic in twins if statistic.name in voted]

    def voted(self) -> list[str]:
        """Names of the statistics that part at the next refresh, by a vote of several ranks."""
        if self._ballot is None:
            return []
        names, votes = self._ballot
        return [name for name, some in zip(names, votes.read(), strict=True) if some]

    def load_voted(self, names: list[str]) -> None:
        """Restore what `voted` gave, and forget whose input each call had."""
        self._ballot = names, Later(torch.ones(len(names)))
        self._parted.clear()
        for statistic in self.all:
            statistic.sources.clear()

    def _settle(self) -> None:
        if self._backward_ran:
            self._backward_ran = False
            for statistic in self.all:
                statistic.fresh.pour_into(statistic.used)
