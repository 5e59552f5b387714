"""AdaMuon: Muon whose update is divided by a running root mean square of itself.

Si, Zhang and Shen, "AdaMuon: Adaptive Muon Optimizer" (arXiv 2507.11005). For a weight W seen as
(C_out, -1) with m x n entries, gradient G and buffers B, V:

    B <- b B + (1 - b) G,          U = (1 - b) G + b B   (Nesterov), or B
    O  = msgn(sign(U)),            V <- b V + (1 - b) O * O
    O' = O / (sqrt(V) + eps)
    W <- (1 - lr * wd) W - lr * 0.2 sqrt(m n) / |O'|_F * O'

The last scale gives every update a root mean square of 0.2, about that of AdamW.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowdopr.linalg import NS_COEFFICIENTS, same_shape, signs, stack_blocks, unstack_blocks
from flowdopr.optim.base import decay_weights
from flowdopr.optim.matrix import MatrixOptimizer
from flowdopr.optim.muon import orthogonalised

UPDATE_RMS = 0.2


class AdaMuon(MatrixOptimizer):
    """AdaMuon for matrices and convolutions, AdamW inside for everything else.

    Args:
        params, weight_decay, nesterov, betas, adamw_lr, adamw_for: as in `Muon`.
        ns_steps, ns_coefficients, ns_dtype: as in `Muon`.
        lr: learning rate of all groups, in AdamW's units.
        momentum: decay rate of the momentum buffer and of the second moment.
        eps: added in both denominators, and in that of the AdamW inside.

    Raises:
        ValueError: a value out of range, or a pattern that matches nothing.
    """

    gp = "adamuon"

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
        ns_dtype: torch.dtype | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adamw_lr: float | None = None,
        adamw_for: Sequence[str] = (),
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "ns_dtype": ns_dtype,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults, adamw_lr, adamw_for)

    def _matrix_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        squares = self.buffers(params, "second_moment")
        directions = signs(self.momentum(params, group))
        decay_weights(params, group)
        for indices in same_shape(params):
            moved = [params[i] for i in indices]
            steps = unstack_blocks(orthogonalised([directions[i] for i in indices], group), moved)
            moments = [squares[i] for i in indices]
            torch._foreach_mul_(moments, group["momentum"])
            torch._foreach_addcmul_(moments, steps, steps, value=1 - group["momentum"])
            roots = torch._foreach_sqrt(moments)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_div_(steps, roots)
            scaled = stack_blocks(steps, group["fused_blocks"])
            norm = torch.linalg.matrix_norm(scaled, keepdim=True).add(group["eps"])
            scaled *= UPDATE_RMS * (scaled.shape[-2] * scaled.shape[-1]) ** 0.5 / norm
            torch._foreach_add_(moved, unstack_blocks(scaled, moved), alpha=-group["lr"])
