"""The hooks that show layer inputs, and for K-FAC output gradients, to the statistics, and the one
that preconditions the gradient of an effective weight.

Hooks hold a number and not the statistics themselves, so that a copy of the model feeds nothing,
the optimizer is freed though its model lives, and torch.compile sees constants.
"""

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack


class Gatherer(Protocol):
    """What takes in the tensors that hooks see."""

    gathering: bool

    def trains(self, index: int) -> bool: ...
    def gather_input(self, index: int, x: Tensor, traced: bool) -> None: ...
    def gather_output_gradient(self, index: int, grad: Tensor) -> None: ...


class Preconditioner(Protocol):
    """What preconditions the gradients of effective weights."""

    def precondition(self, index: int, grad: Tensor) -> Tensor: ...


_LIVING: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


def register(of_hooks: Gatherer | Preconditioner) -> int:
    """The handle by which hooks find `of_hooks` while it lives."""
    handle = next(_HANDLES)
    _LIVING[handle] = of_hooks
    return handle


def unregister(handle: int) -> None:
    """Let the hooks with this handle do nothing from now on."""
    _LIVING.pop(handle, None)


def is_recomputation() -> bool:
    """Whether a forward that runs now repeats, for checkpointing, one that was counted.

    Inside a backward, reentrant checkpointing runs a forward with gradients for the first time,
    from a node of its own; the other kind repeats one, because a layer's own node wants its tensors
    back.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    node = torch._C._current_autograd_node()
    return node is None or node.name() != "CheckpointFunctionBackward"


class Hook:
    """A hook of one module; it does nothing once copied or unpickled."""

    def __init__(self, handle: int = -1, index: int = 0, token: Tensor | None = None) -> None:
        self.handle, self.index, self.token = handle, index, token

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class InputHook(Hook):
    """The forward pre-hook that gathers an input, the `argument` of this place and name."""

    def __init__(
        self,
        handle: int = -1,
        index: int = 0,
        token: Tensor | None = None,
        argument: tuple[int, str] = (0, "input"),
    ) -> None:
        super().__init__(handle, index, token)
        self.argument = argument

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.token is None or not module.training or not torch.is_grad_enabled():
            return
        place, name = self.argument
        x = args[place] if place < len(args) else kwargs.get(name)
        if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided:
            return  # it has no rows of z, and the layer is reported as one without statistics
        if torch.compiler.is_compiling():
            torch.ops.flowdopr.gather(x.detach(), self.token, self.handle, self.index)
        elif peek_interpreter_stack() is None:  # not inside torch.func
            _gather_input(x, self.handle, self.index, traced=False)


class OutputGradientHook(Hook):
    """The forward hook that gathers the gradient of the output, for K-FAC.

    A checkpointed layer counts once: the output of only one of its two forwards gets a gradient.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not module.training or not output.requires_grad or peek_interpreter_stack() is not None:
            return
        gatherer = _LIVING.get(self.handle)
        if gatherer is not None and gatherer.gathering and gatherer.trains(self.index):
            handle, index = self.handle, self.index
            output.register_hook(lambda grad: _gather_output_gradient(grad, handle, index))


class EffectiveWeightHook(Hook):
    """The forward hook of a map on a weight, which preconditions the gradient of what the map
    returns before the backward pass carries it through the map."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], weight: Tensor) -> Tensor | None:
        if not module.training or not weight.requires_grad:
            return None
        if not torch.compiler.is_compiling() and peek_interpreter_stack() is not None:
            return None
        return torch.ops.flowdopr.effective(weight, self.handle, self.index)


def _gather_input(x: Tensor, handle: int, index: int, *, traced: bool) -> None:
    gatherer = _LIVING.get(handle)
    if gatherer is not None:
        gatherer.gather_input(index, x, traced)


def _gather_output_gradient(grad: Tensor, handle: int, index: int) -> None:
    gatherer = _LIVING.get(handle)
    # torch.autograd batches the gradients of a Jacobian (`is_grads_batched`).
    if gatherer is not None and not is_legacy_batchedtensor(grad):
        gatherer.gather_output_gradient(index, grad)


@torch.library.custom_op("flowdopr::gather", mutates_args=("token",))
def _gather_op(x: Tensor, token: Tensor, handle: int, index: int) -> None:
    """`_gather_input`, opaque to torch.compile: whether a step gathers is no guard of its graph."""
    _gather_input(x, handle, index, traced=True)


@_gather_op.register_fake
def _gather_fake(x: Tensor, token: Tensor, handle: int, index: int) -> None:
    return None


@torch.library.custom_op("flowdopr::effective", mutates_args=())
def _effective_op(weight: Tensor, handle: int, index: int) -> Tensor:
    """A copy of `weight`, whose gradient goes through `flowdopr::precondition`."""
    return weight.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("flowdopr::precondition", mutates_args=())
def _precondition_op(grad: Tensor, handle: int, index: int) -> Tensor:
    """`Preconditioner.precondition`, opaque to torch.compile: a new T does not recompile."""
    living = _LIVING.get(handle)
    found = grad if living is None else living.precondition(index, grad)
    return grad.new_empty(grad.shape).copy_(found)


def _fake(x: Tensor, handle: int, index: int) -> Tensor:
    return x.new_empty(x.shape)


def _keep_place(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    _, ctx.handle, ctx.index = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.flowdopr.precondition(grad, ctx.handle, ctx.index), None, None


_effective_op.register_fake(_fake)
_precondition_op.register_fake(_fake)
_effective_op.register_autograd(_backward, setup_context=_keep_place)
