"""K-FAC, a baseline: DoPr's factor of the layer inputs and, beside it, one of the output gradients.

Martens and Grosse (arXiv 1503.05671), with convolutions after Grosse and Martens (arXiv
1602.01407). For a layer y = W z with d_out outputs, n rows and output gradients g:

    A = E[z z^T],  B = E[g g^T]        (of the training loss itself: the empirical Fisher)
    M = S(B)^-1 G S(A)^-1,  S(X) = (X / mean(X) + damping I) / (1 + damping)
    V <- m V + M
    W <- (1 - lr * wd) W - lr V

where mean(.) is the mean eigenvalue. Each refresh's B is also divided by its own mean eigenvalue
before it is averaged with earlier ones, so that a loss scale which changes, or gradients which
vanish, leave the average as it is. Rows are all positions of all samples ("expand" in Eschenhagen
et al., arXiv 2311.00636). Dividing by the means drops one scalar per layer, which for the empirical
Fisher grows without bound as the gradients vanish; M keeps the size of G, and the learning rate is
one of SGD with momentum.
"""

import re
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from flowdopr.linalg import is_sharded
from flowdopr.optim.base import decay_weights
from flowdopr.optim.dopr.dopr import DoPr
from flowdopr.optim.dopr.layers import Layer, LayerRule, is_number
from flowdopr.optim.dopr.statistics import SecondMoment
from flowdopr.optim.dopr.views import LinearView, Sample
from flowdopr.optim.matrix import MatrixOptimizer
from flowdopr.optim.roles import DECAYED, parameter_roles
from flowdopr.patterns import patterns_in


class KFAC(DoPr):
    """K-FAC for Linear layers and ungrouped convolutions, AdamW inside for everything else.

    Its statistics are those of DoPr: gathered on refresh steps, averaged with the same warm-up,
    summed over processes. A weight whose layer no refresh has seen takes the same step with G in
    place of M.

    Args:
        model: its layers are watched by hooks until the optimizer is closed or gone.
        lr: learning rate, in the units of SGD.
        weight_decay: decoupled, for matrices and convolutions.
        momentum: decay rate of the sum of preconditioned gradients.
        damping: added to both factors, relative to the mean eigenvalue of each.
        cov_decay: decay of the running averages of both factors, per refresh.
        refresh_every: steps between refreshes of the factors and their inverses.
        betas, eps, adamw_for: as in `Muon`.
        adamw_lr: learning rate of the AdamW inside; None: `lr`.

    Raises:
        ValueError: a value out of range, a pattern that matches nothing, sharded weights, or a
            model without a layer for it.
    """

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
        if not is_number(damping) or damping <= 0:
            raise ValueError(f"KFAC: damping is {damping}, it must be one number above 0")
        if any(is_sharded(p) for p in model.parameters()):
            raise ValueError(
                "kfac: takes whole weights, not FSDP's shards: use DDP, or SGD in DoPr"
            )
        bypassed = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        supported = _supported_weights(model, bypassed)
        left_out = [
            role.name
            for role in parameter_roles(model)
            if role.kind in DECAYED and role.parameter.requires_grad
            if role.parameter not in supported
        ]
        patterns = [*patterns_in(adamw_for), *(f"^{re.escape(name)}$" for name in left_out)]
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
        }
        optimizer = _MomentumSGD(model, defaults, adamw_lr, patterns)
        taken = {
            p for group in optimizer.param_groups if group["gp"] == "kfac" for p in group["params"]
        }
        if not taken:
            raise ValueError("kfac: the model has no Linear or convolution for it: use adamw")
        super().__init__(
            optimizer,
            model,
            damping=damping,
            cov_decay=cov_decay,
            refresh_every=refresh_every,
            max_rows="all",
            rules=_rules(model, bypassed, taken),
        )
        self._outputs = {layer.name: self._watch_outputs(layer) for layer in self.found.layers}

    def _watch_outputs(self, layer: Layer) -> SecondMoment:
        """The second moment of a layer's output gradients."""
        weight, (module, _) = layer.weight, layer.modules[0]
        view = OutputGradientView(weight.shape[0], _axes(module))
        name = f"{layer.name} (output gradients)"
        moment = SecondMoment(name, view, weight, free_of_scale=True)
        self.statistics.watch_output_gradients(moment, module, view)
        return moment

    def _step_preconditioned(self, ready: list[tuple[Layer, Tensor]]) -> None:
        """Put M in place of G, from both sides, and let the GP step."""
        both = []
        for layer, right in ready:
            left, weight = self.transform_of(self._outputs[layer.name]), layer.weight
            if left is not None and weight.grad is not None:
                product = left[0, 0] @ weight.grad.flatten(1).to(left.dtype)
                weight.grad = product.reshape(weight.shape).to(weight.dtype)
                both.append((layer, right))
        super()._step_preconditioned(both)


class OutputGradientView(LinearView):
    """Gradients of a layer's output, (..., d_out) or (B, d_out, *axes), as rows of one matrix."""

    def __init__(self, d_out: int, axes: int) -> None:
        super().__init__("full", 1, d_out)
        self.axes = axes

    def rows(self, x: Tensor, sample: Sample) -> tuple[Tensor, int]:
        return super().rows(x.movedim(-1 - self.axes, -1), sample)


class _MomentumSGD(MatrixOptimizer):
    """V <- m V + G, W <- (1 - lr wd) W - lr V for matrices, AdamW for everything else."""

    gp = "kfac"

    def _matrix_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        momenta = self.buffers(params, "momentum_buffer")
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, [p.grad for p in params if p.grad is not None])
        decay_weights(params, group)
        torch._foreach_add_(params, momenta, alpha=-group["lr"])


def _axes(module: nn.Module) -> int:
    """How many axes of positions follow the channels in the output of `module`."""
    return len(module.kernel_size) if isinstance(module, _ConvNd) else 0


def _layer_weights(model: nn.Module, bypassed: Container[nn.Module]) -> dict[str, Tensor]:
    """Name of a layer -> its weight, each weight once, without the `bypassed` modules."""
    found: dict[Tensor, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        is_layer = isinstance(module, (nn.Linear, nn.Embedding, _ConvNd))
        if is_layer and weight is not None and module not in bypassed:
            found.setdefault(weight, name)
    return {name: weight for weight, name in found.items()}


def _rules(
    model: nn.Module, bypassed: Container[nn.Module], taken: Container[Tensor]
) -> list[LayerRule]:
    """One for each layer: the whole input factor for weights in `taken`, none for all others."""
    rules = []
    for name, weight in _layer_weights(model, bypassed).items():
        mode = "full" if weight in taken else "none"
        rules.append(LayerRule(f"^{re.escape(name)}$", mode))
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inside = re.escape(f"{name}." if name else "")
            rules.append(LayerRule(f"^{inside}[a-z]+_proj$", "none"))
    return rules


def _supported_weights(model: nn.Module, bypassed: Container[nn.Module]) -> set[Tensor]:
    """Weights that exactly one Linear or ungrouped convolution of `model` owns, without those of
    the `bypassed` modules, which are never called."""
    modules = list(model.modules())
    weights = [module._parameters.get("weight") for module in modules]
    return {
        weight
        for module, weight in zip(modules, weights, strict=True)
        if isinstance(module, nn.Linear)
        or (
            isinstance(module, _ConvNd)
            and not isinstance(module, _ConvTransposeNd)
            and module.groups == 1
        )
        if weight is not None
        and sum(other is weight for other in weights) == 1
        and module not in bypassed
    }
