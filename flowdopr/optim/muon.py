"""Muon: momentum, orthogonalised by Newton-Schulz, for matrices and convolutions.

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale
"match_rms_adamw" is from Moonshot's "Muon is Scalable for LLM Training" (arXiv 2502.16982), and
"original" that of github.com/KellerJordan/Muon at commit 00ba60d.
For a weight W seen as (C_out, -1), gradient G, momentum buffer B:

    B <- m B + (1 - m) G
    U  = (1 - m) G + m B       (Nesterov), or B
    W <- (1 - lr * wd) W - lr * scale * msgn(U),   msgn(U) = (U U^T)^(-1/2) U

These are the conventions of `torch.optim.Muon`, which takes two-dimensional parameters only.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowdopr.linalg import (
    NS_COEFFICIENTS,
    newton_schulz,
    same_shape,
    stack_blocks,
    unstack_blocks,
)
from flowdopr.optim.base import decay_weights
from flowdopr.optim.matrix import MatrixOptimizer


def original_scale(rows: int, cols: int, kernel: Sequence[int]) -> float:
    """max(1, rows / cols)^0.5 of a matrix. Jordan's code takes the last two axes of the unflattened
    gradient, which are the kernel's height and width in a convolution, so that a square kernel has
    1; here a kernel of one axis has 1 as well."""
    if kernel:
        rows, cols = kernel[-2:] if len(kernel) > 1 else (1, 1)
    return math.sqrt(max(1.0, rows / cols))


def match_rms_adamw_scale(rows: int, cols: int, kernel: Sequence[int]) -> float:
    """0.2 max(rows, cols)^0.5, which makes updates as large as those of AdamW."""
    return 0.2 * math.sqrt(max(rows, cols))


SCALES = {"original": original_scale, "match_rms_adamw": match_rms_adamw_scale}


def orthogonalised(tensors: list[Tensor], group: dict[str, Any]) -> Tensor:
    """msgn of tensors of one shape by a group's settings, stacked: (K * blocks, rows, cols)."""
    return newton_schulz(
        stack_blocks(tensors, group["fused_blocks"]),
        steps=group["ns_steps"],
        coefficients=group["ns_coefficients"],
        dtype=group["ns_dtype"],
    )


class Muon(MatrixOptimizer):
    """Muon for matrices and convolutions, AdamW inside for everything else.

    Args:
        params: a model, whose parameters are routed by role (see `roles.py`), or parameters or
            parameter groups; a group may set "gp" to "muon" or "adamw" (or `use_muon` to True or
            False, as in Keller Jordan's code), and "fused_blocks".
        lr: learning rate of all groups, in the units that `adjust_lr` sets.
        weight_decay: decoupled; with a model, for matrices and convolutions only.
        momentum: decay rate of the momentum buffer.
        nesterov: whether the momentum is Nesterov's.
        adjust_lr: "match_rms_adamw" (0.2 sqrt(max(rows, cols)): updates as large as AdamW's, so
            that one learning rate serves both) or "original" (Keller Jordan's: max(1,
            rows/cols)^0.5 for a matrix and 1 for a convolution with a square kernel; learning
            rates near 0.02 are usual and `adamw_lr` should be given).
        ns_steps: number of Newton-Schulz steps, see `newton_schulz`.
        ns_coefficients: (a, b, c) of each of these steps.
        ns_dtype: precision of these steps; None: bfloat16 on CUDA, elsewhere that of the weights,
            float32 at least.
        betas: decay rates of the averages in the AdamW inside.
        eps: added to the square root in the denominator of the AdamW inside.
        adamw_lr: learning rate of the AdamW inside; None: `lr`.
        adamw_for: regular expressions on names of matrices that AdamW updates instead, such as
            first and last layers.

    Raises:
        ValueError: a value out of range, a pattern that matches nothing, or `adamw_for` where
            `params` is not a model.
    """

    gp = "muon"

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr: str = "match_rms_adamw",
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
        ns_dtype: torch.dtype | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adamw_lr: float | None = None,
        adamw_for: Sequence[str] = (),
    ) -> None:
        if adjust_lr not in SCALES:
            raise ValueError(f"muon: adjust_lr='{adjust_lr}' is not one of {', '.join(SCALES)}")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "adjust_lr": adjust_lr,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "ns_dtype": ns_dtype,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults, adamw_lr, adamw_for)

    def _matrix_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        updates = self.momentum(params, group)
        decay_weights(params, group)
        for indices in same_shape(params):
            steps = orthogonalised([updates[i] for i in indices], group)
            moved = [params[i] for i in indices]
            rows, cols = steps.shape[-2:]
            scale = SCALES[group["adjust_lr"]](rows, cols, moved[0].shape[2:])
            torch._foreach_add_(moved, unstack_blocks(steps, moved), alpha=-group["lr"] * scale)
