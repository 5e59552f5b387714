"""K-FAC, a baseline: DoPr's input factor and, beside it, the factor of the output gradients.

Martens and Grosse (arXiv 1503.05671), with convolutions after Grosse and Martens (arXiv
1602.01407). For a layer y = W z with d_out outputs, n rows and output gradients g:

    A = E[z z^T],  B = E[g g^T]        (of the training loss itself: the empirical Fisher)
    M = (B / mean(B) + damping I)^-1 G (A / mean(A) + damping I)^-1
    V <- m V + M
    W <- (1 - lr * wd) W - lr V

where mean(.) is the mean eigenvalue. Rows are all positions of all samples ("expand" in
Eschenhagen et al., arXiv 2311.00636). Dividing by the means drops one scalar per layer, which
for the empirical Fisher grows without bound as the gradients vanish; M keeps the size of G, and
the learning rate is one of SGD with momentum.

Several processes (DDP) share their factors: sums and row counts are added over ranks with one
all-reduce a refresh, so N ranks take the steps of one process with the whole batch.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from flowdopr.optim.conv import patch_rows
from flowdopr.optim.matrix import MatrixOptimizer, call_closure, decay_weights
from flowdopr.optim.roles import DECAYED, parameter_roles
from flowdopr.optim.world import is_sharded, summed, world_size


class KFAC(MatrixOptimizer):
    """K-FAC for Linear layers and ungrouped convolutions, AdamW inside for everything else.

    Args:
        model: its layers are watched by hooks until the optimizer is gone.
        lr: learning rate, in the units of SGD.
        weight_decay: decoupled, for matrices and convolutions.
        momentum: of the preconditioned gradient.
        damping: relative to the mean eigenvalue of each factor.
        cov_decay: of the running averages of both factors, per refresh.
        refresh_every: steps between refreshes.
        betas, eps, adamw_for: as in `Muon`.
        adamw_lr: learning rate of the AdamW inside.

    Raises:
        ValueError: a value out of range, a pattern that matches nothing, or sharded weights.
    """

    gp = "kfac"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        damping: float = 0.1,
        cov_decay: float = 0.95,
        refresh_every: int = 16,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adamw_lr: float | None = None,
        adamw_for: Sequence[str] = (),
    ) -> None:
        if isinstance(damping, Sequence):
            raise ValueError(f"kfac: damping is one number, not a schedule, got {damping}")
        if not (damping > 0 and 0 <= cov_decay < 1 and refresh_every >= 1):
            raise ValueError(
                "kfac: damping must be positive, cov_decay in [0, 1) and refresh_every at least 1, "
                f"got {damping}, {cov_decay} and {refresh_every}"
            )
        if any(is_sharded(p) for p in model.parameters()):
            raise ValueError("kfac: takes whole weights, not FSDP's shards: use DDP, or 'dopr-sgd'")
        layers = _supported_layers(model)
        unsupported = [
            f"^{re.escape(role.name)}$"
            for role in parameter_roles(model)
            if role.kind in DECAYED and role.parameter not in layers
        ]
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "damping": damping,
            "cov_decay": cov_decay,
            "refresh_every": refresh_every,
            "steps": 0,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(model, defaults, adamw_lr, [*adamw_for, *unsupported])
        self._sums: dict[Tensor, tuple[Tensor, Tensor, int]] = {}
        for index, group in enumerate(self.param_groups):
            for weight in group["params"] if group["gp"] == self.gp else ():
                self._watch(layers[weight], weight, index)

    def _watch(self, layer: nn.Module, weight: Tensor, index: int) -> None:
        """Gather both factors when the gradient of an output arrives.

        Waiting for the gradient keeps evaluation forwards out, and counts a checkpointed layer
        once: only one of its two forwards has an output that receives a gradient.
        """

        def watch_output(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad and self._is_due(weight, self.param_groups[index]):
                inputs = args[0].detach()
                output.register_hook(lambda grad: self._gather(layer, weight, inputs, grad))

        layer.register_forward_hook(watch_output)

    def _is_due(self, weight: Tensor, group: dict[str, Any]) -> bool:
        """Whether this step renews the weight's factors: at refreshes, and until it has some."""
        return group["steps"] % group["refresh_every"] == 0 or not self.state[weight]

    @torch.no_grad()
    def _gather(self, layer: nn.Module, weight: Tensor, inputs: Tensor, grad: Tensor) -> None:
        if isinstance(layer, _ConvNd):
            z, g = patch_rows(inputs, layer, None), grad.movedim(1, -1).flatten(0, -2)
        else:
            z, g = inputs.flatten(0, -2), grad.flatten(0, -2)
        z, g = z.to(weight.dtype), g.to(weight.dtype)
        a, b, rows = self._sums.get(weight, (0, 0, 0))
        self._sums[weight] = (a + z.mT @ z, b + g.mT @ g, rows + z.shape[0])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; what was gathered with the gradients goes with them."""
        self._sums.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        """Renew the factors that are due, then step; returns the closure's loss if any."""
        loss = call_closure(closure)
        due = [
            (p, group)
            for group in self.param_groups
            for p in (group["params"] if group["gp"] == self.gp else ())
            if self._is_due(p, group)
        ]
        pooled = self._pooled([p for p, _ in due])
        for (p, group), (a, b, rows) in zip(due, pooled, strict=True):
            if rows:
                self._refresh(p, a / rows, b / rows, group)
        for group in self.param_groups:
            group["steps"] += 1
        super().step()
        return loss

    def _matrix_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        known = [p for p in params if "inverse_a" in self.state[p]]
        if not known:
            return
        momenta = self.buffers(known, "momentum_buffer")
        torch._foreach_mul_(momenta, group["momentum"])
        for p, momentum in zip(known, momenta, strict=True):
            if p.grad is not None:
                step = self.state[p]["inverse_b"] @ p.grad.flatten(1) @ self.state[p]["inverse_a"]
                momentum.add_(step.reshape(p.shape))
        decay_weights(known, group)
        torch._foreach_add_(known, momenta, alpha=-group["lr"])

    def _pooled(self, weights: list[Tensor]) -> list[tuple[Tensor, Tensor, float]]:
        """What all ranks gathered for each weight: sums of z z^T and g g^T, and number of rows.

        Every rank takes part for every weight, with zeros where its layer did not run. DDP
        averages gradients, so a rank's own g is N times that of the whole batch.
        """
        if not weights:
            return []
        sums, rows = [], []
        for p in weights:
            d_out, d_in = p.flatten(1).shape
            nothing = p.new_zeros(d_in, d_in), p.new_zeros(d_out, d_out), 0
            a, b, n = self._sums.get(p, nothing)
            sums += [a, b / world_size() ** 2]
            rows.append(n)
        self._sums.clear()
        counts = torch.tensor(rows, dtype=torch.float32, device=weights[0].device)
        counts, *sums = summed([counts, *sums])
        return list(zip(sums[::2], sums[1::2], counts.tolist(), strict=True))

    def _refresh(self, p: Tensor, a: Tensor, b: Tensor, group: dict[str, Any]) -> None:
        """Average the new factors in and invert them, each divided by its mean eigenvalue."""
        state, keep = self.state[p], group["cov_decay"]
        for name, batch in (("a", a), ("b", b)):
            old = state.get(f"factor_{name}")
            factor = batch if old is None else old.lerp(batch, 1 - keep)
            mean = factor.diagonal().mean().clamp(min=torch.finfo(factor.dtype).tiny)
            damped = factor / mean + group["damping"] * torch.eye(
                len(factor), dtype=factor.dtype, device=factor.device
            )
            state[f"factor_{name}"] = factor
            state[f"inverse_{name}"] = torch.cholesky_inverse(torch.linalg.cholesky(damped))


def _supported_layers(model: nn.Module) -> dict[Tensor, nn.Module]:
    """Weights that exactly one Linear or ungrouped convolution of `model` owns, and that owner."""
    owners: Counter[Tensor] = Counter()
    for module in model.modules():
        owners.update(module.parameters(recurse=False))
    return {
        module.weight: module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        or (
            isinstance(module, _ConvNd)
            and not isinstance(module, _ConvTransposeNd)
            and module.groups == 1
        )
        if owners[module.weight] == 1
    }
