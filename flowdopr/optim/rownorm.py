"""Row normalisation: momentum, each output's row of it scaled to one length.

One of the norm-constrained steps of Pethick et al., "Training Deep Learning Models with
Norm-Constrained LMOs" (arXiv 2502.07529). For a weight W seen as (C_out, cols), gradient G:

    B <- m B + (1 - m) G
    W <- (1 - lr * wd) W - lr * 0.2 sqrt(cols) B / |rows of B|

It needs no products of matrices, and is the cheapest GP whose steps under DoPr's "sandwich" do
not depend on the coordinates of the layer's input.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowdopr.optim.base import decay_weights
from flowdopr.optim.matrix import MatrixOptimizer

UPDATE_RMS = 0.2  # about that of AdamW, so that one learning rate serves both


class RowNorm(MatrixOptimizer):
    """Row normalisation for matrices and convolutions, AdamW inside for everything else.

    Args:
        params, weight_decay, betas, adamw_lr, adamw_for: as in `Muon`.
        lr: learning rate of all groups, in AdamW's units.
        momentum: decay rate of the momentum buffer.
        eps: smallest length of a row, and the epsilon of the AdamW inside.

    Raises:
        ValueError: a value out of range, or a pattern that matches nothing.
    """

    gp = "rownorm"

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adamw_lr: float | None = None,
        adamw_for: Sequence[str] = (),
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults, adamw_lr, adamw_for)

    def _matrix_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        rows = [update.flatten(1) for update in self.momentum(params, group)]
        lengths = [torch.linalg.vector_norm(row, dim=1, keepdim=True) for row in rows]
        torch._foreach_clamp_min_(lengths, group["eps"])
        torch._foreach_div_(lengths, [UPDATE_RMS * row.shape[1] ** 0.5 for row in rows])
        steps = torch._foreach_div(rows, lengths)
        decay_weights(params, group)
        shaped = [step.view_as(p) for step, p in zip(steps, params, strict=True)]
        torch._foreach_add_(params, shaped, alpha=-group["lr"])
