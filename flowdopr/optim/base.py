"""The base class of every optimizer here: it calls the closure and steps in float32.

Weights of bfloat16 or float16 take their steps in float32 with state in float32, and are rounded
once at the end: in their own precision the squares of small gradients, and an epsilon of 1e-8,
would be zero. Autocast does not reach a step.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowdopr.linalg import in_float32


class Float32Optimizer(torch.optim.Optimizer):
    """Base of all optimizers here, which do their work in `_update_all`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss if any.

        Raises:
            ValueError: a sparse gradient that the method cannot use.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with in_float32(self._parameters()):
            self._update_all()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, which gives state the precision that its weight has meanwhile."""
        with in_float32(self._parameters()):
            super().load_state_dict(state_dict)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _update_all(self) -> None:
        """Update every parameter that has a gradient."""
        raise NotImplementedError


class Float32Step(Float32Optimizer):
    """Lets the optimizer of another package, its next base, step in float32, too."""

    def _update_all(self) -> None:
        # The plain function, since torch's wrapper around it would run all hooks a second time.
        inspect.unwrap(super(Float32Optimizer, self).step.__func__)(self)  # pyright: ignore


def with_gradients(params: list[Tensor]) -> list[Tensor]:
    """Those of `params` that have a gradient and an element.

    Raises:
        ValueError: a sparse gradient.
    """
    found = [p for p in params if p.grad is not None and p.numel()]
    if any(p.grad.is_sparse for p in found if p.grad is not None):
        raise ValueError(
            "the optimizer cannot use sparse gradients: build embeddings with sparse=False, or "
            "leave them to torch.optim.SparseAdam"
        )
    return found


def decay_weights(params: list[Tensor], group: dict[str, Any]) -> None:
    """W <- (1 - lr * weight_decay) W."""
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
