"""Signum: the sign of the momentum, for every parameter alike.

Bernstein et al., "signSGD: compressed optimisation for non-convex problems" (ICML 2018):

    B <- m B + (1 - m) G
    W <- (1 - lr * wd) W - lr * sign(B)
"""

from collections.abc import Iterable
from typing import Any

import torch

from flowdopr.linalg import signs
from flowdopr.optim.base import Float32Optimizer, decay_weights, with_gradients


class Signum(Float32Optimizer):
    """Signum with decoupled weight decay.

    Args:
        params: parameters or parameter groups.
        lr: the size of every entry of the update; about a third of a good AdamW learning rate.
        momentum: decay rate of the momentum buffer; 0 gives signSGD.
        weight_decay: decoupled.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0 or not weight_decay >= 0:
            raise ValueError(
                f"signum: lr={lr} and weight_decay={weight_decay} must not be negative"
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"signum: momentum={momentum} must lie in [0, 1)")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _update_all(self) -> None:
        for group in self.param_groups:
            params = with_gradients(group["params"])
            if not params:
                continue
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            grads = [p.grad for p in params if p.grad is not None]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            decay_weights(params, group)
            torch._foreach_add_(params, signs(momenta), alpha=-group["lr"])
