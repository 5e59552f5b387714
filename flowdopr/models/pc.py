"""PC layers: weights whose small singular values an odd polynomial lifts (arXiv 2606.06470).

A layer computes y = f(W) z, and the raw W is trained. With sigma = u^T W v + eps, where u and v are
estimates of the first singular vectors:

    W'   = W / sigma                        largest singular value about 1
    W''  = W' p(W'^T W') = p(W' W'^T) W'    each singular value s becomes s p(s^2)
    f(W) = gain * [sigma] * W''             both factors by choice; no gradient through [sigma]

sigma in the quotient is differentiated, u and v are not. `update_spectral_norms` refines them after
each step of the optimizer, and no forward does, so that accumulation, recomputation for
checkpointing, compilation and several processes all see one f. `merge_pc_layers` writes f(W) into
plain layers when training is done.

    model = add_pc_layers(model)              # before the optimizer is built
    for step in range(steps):
        ...                                   # forward, backward, optimizer.step()
        update_spectral_norms(model, step)
    merge_pc_layers(model)

Shapes: a weight is K matrices of r x c, stacked along its first axis, each with its own sigma and
gain: `fused_blocks` (q, k and v) or the groups of a convolution. A convolution is the matrix
(C_out, C_in k k).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flowdopr.linalg import same_shape, stack_blocks
from flowdopr.models.layers import Conv2d, EffectiveWeight, Linear
from flowdopr.patterns import finder, patterns_in

DEFAULT_LAYERS = (r"(^|\.)(mlp\.(up|down)|attention\.proj)$",)
"""The MLPs and the outputs of attention, as in the paper."""
LEVELS = (
    (1.0,),
    (1.507, -0.507),
    (2.083, -1.643, 0.560),
    (2.909, -4.649, 4.023, -1.283),
    (3.625, -9.261, 14.097, -10.351, 2.890),
)
"""Coefficients of p, from the constant up, for each level."""
BANDS = ((0.05, 1.0), (0.0752, 1.0001), (0.1039, 1.0102), (0.1448, 1.0190), (0.1800, 1.0206))
"""Where s p(s^2) lies, for each level, if s is in [0.05, 1]."""
Model = TypeVar("Model", bound=nn.Module)
OURS: dict[type, type] = {nn.Linear: Linear, nn.Conv2d: Conv2d}
EPS = 1e-7
SETTLING = 100
"""Power iterations for weights that were loaded or averaged."""
STARTING = 10, 100
"""Power iterations at least, in so many first steps: weights that start at zero turn as a whole
there. With one iteration the norm of such a weight came out at half of what it was, which level 4
makes a thousandfold f(W)."""


class PCMap(nn.Module):
    """f of one weight: the raw W -> f(W), of its shape and dtype, computed in float32 at least.

    Rounded to bfloat16 on the way, f(W) is wrong by 0.5 % at level 4, three times as much as by
    rounding at the end. So autocast does not reach the map.

    Args:
        weight: W, (K r, ...) with c elements a row.
        blocks: K.
        coefficients: of p, from the constant up.
        recover_norm, gain, power_iterations: see `add_pc_layers`.
    """

    u: Tensor
    v: Tensor

    def __init__(
        self,
        weight: Tensor,
        blocks: int,
        coefficients: Sequence[float],
        *,
        recover_norm: bool,
        gain: bool,
        power_iterations: int,
    ):
        super().__init__()
        self.blocks, self.coefficients = blocks, coefficients
        self.recover_norm, self.power_iterations = recover_norm, power_iterations
        rows, columns = len(weight) // blocks, weight[0].numel()
        # Drawn from no generator, so that the model and its training draw the same numbers without.
        for name, size in (("u", rows), ("v", columns)):
            start = torch.sin(torch.arange(1.0, size + 1, device=weight.device))
            unit = nn.functional.normalize(start, dim=0).to(weight.dtype)
            self.register_buffer(name, unit.repeat(blocks, 1))
        ones = torch.ones(blocks, dtype=weight.dtype, device=weight.device)
        self.gain = nn.Parameter(ones) if gain else None

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            w = weight.reshape(self.blocks, self.u.shape[1], self.v.shape[1])
            w = w.to(torch.promote_types(w.dtype, torch.float32))
            # Copies, since an update or DDP may change the buffers before the backward pass.
            u, v = self.u.to(w.dtype, copy=True), self.v.to(w.dtype, copy=True)
            sigma = ((w @ v[..., None])[..., 0] * u).sum(-1) + EPS
            mapped = polynomial(w / sigma[:, None, None], self.coefficients)
            scale = sigma.detach() if self.recover_norm else torch.ones_like(sigma)
            if self.gain is not None:
                scale = scale * self.gain
            return (mapped * scale[:, None, None]).reshape(weight.shape).to(weight.dtype)


def polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """x p(x^T x) of matrices (K, r, c), with p by its coefficients from the constant up."""
    constant, *rest = coefficients
    if not rest:
        return x * constant
    wide = x.shape[-2] <= x.shape[-1]
    gram = x @ x.mT if wide else x.mT @ x
    higher = rest[-1] * gram
    for coefficient in reversed(rest[:-1]):
        higher = torch.baddbmm(gram, higher, gram, beta=coefficient)
    pair = (higher, x) if wide else (x, higher)
    return torch.baddbmm(x, *pair, beta=constant)


def add_pc_layers(
    model: Model,
    level: int = 4,
    layers: Sequence[str] = DEFAULT_LAYERS,
    *,
    recover_norm: bool = True,
    gain: bool = True,
    power_iterations: int = 1,
) -> Model:
    """Turn layers of `model` into PC layers, in place, and return it.

    Layers of torch's own classes become those of `models.layers`.

    Args:
        level: 0 to 4, the degree of p; 0 normalises alone.
        layers: a regular expression or several, searched in the names of Linear and Conv2d layers.
        recover_norm: multiply by the spectral norm again, as a constant.
        gain: multiply each matrix by a trained scalar, 1 at the start.
        power_iterations: of one `update_spectral_norms`.

    Raises:
        ValueError: a level out of range, a pattern that finds no layer, or a layer that cannot be a
            PC layer.
    """
    if level not in range(len(LEVELS)):
        raise ValueError(f"model.pc.level is {level}, it must be 0 to {len(LEVELS) - 1}")
    named = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    chosen: dict[str, Any] = {}
    for pattern in patterns_in(layers):
        found = {name: layer for name, layer in named.items() if finder(pattern)(name)}
        if not found:
            raise ValueError(
                f"model.pc.layers: '{pattern}' finds no Linear or Conv2d layer of the "
                f"{type(model).__name__}: correct or remove it"
            )
        chosen |= found
    owners = Counter(module._parameters.get("weight") for module in model.modules())
    for name, layer in chosen.items():
        if reason := _why_not(layer, owners, recover_norm):
            raise ValueError(f"model.pc.layers: '{name}' {reason}: let no pattern match it")
    for layer in chosen.values():
        layer.__class__ = OURS.get(type(layer), type(layer))
        layer.weight_map = PCMap(
            layer.weight,
            getattr(layer, "fused_blocks", 1) * getattr(layer, "groups", 1),
            LEVELS[level],
            recover_norm=recover_norm,
            gain=gain,
            power_iterations=power_iterations,
        )
    update_spectral_norms(model)
    return model


def _why_not(layer: nn.Module, owners: Counter, recover_norm: bool) -> str:
    """Why a Linear or Conv2d cannot be a PC layer; "" if it can."""
    weight = layer._parameters.get("weight")
    if weight is None or not issubclass(OURS.get(type(layer), type(layer)), EffectiveWeight):
        return f"is a {type(layer).__name__}, which may use its weight in a way of its own"
    if "weight_map" in layer._modules:
        return "is one already"
    if owners[weight] > 1:
        return "shares its weight with another layer"
    if not recover_norm and not weight.is_meta and not weight.any():
        return "starts at zero, which recover_norm=false would divide by zero"
    return ""


def pc_layers(model: nn.Module) -> dict[str, Any]:
    """The PC layers of `model`, by name."""
    named = model.named_modules()
    return {name: m for name, m in named if isinstance(m._modules.get("weight_map"), PCMap)}


@torch.no_grad()
def update_spectral_norms(model: nn.Module, step: int | None = None) -> None:
    """Refine u and v of all PC layers by power iteration, those of one shape together.

    The device does it without the host. Every process gets the same result from the same weights;
    whole matrices of sharded weights are gathered. A matrix of zeros leaves its u and v as they
    are.

    Args:
        step: number of the step that the optimizer has just made, from 0. None: the weights were
            loaded or averaged, and u and v must be found anew.
    """
    iterations, first = STARTING
    by_kind: dict[tuple[int, int], list[Any]] = {}
    for layer in pc_layers(model).values():
        known = layer.weight_map
        by_kind.setdefault((known.blocks, known.power_iterations), []).append(layer)
    for (blocks, own), layers in by_kind.items():
        for chosen in same_shape([layer.weight for layer in layers]):
            maps = [layers[i].weight_map for i in chosen]
            w = stack_blocks([layers[i].weight for i in chosen], blocks)
            w = w.to(torch.promote_types(w.dtype, torch.float32))
            u, v = (torch.cat([getattr(m, n) for m in maps]).to(w)[..., None] for n in "uv")
            least = SETTLING if step is None else iterations if step < first else 1
            for _ in range(max(own, least)):
                v = _unit(w.mT @ u, v)
                u = _unit(w @ v, u)
            for m, new_u, new_v in zip(maps, u.split(blocks), v.split(blocks), strict=True):
                m.u.copy_(new_u[..., 0])
                m.v.copy_(new_v[..., 0])


def _unit(x: Tensor, otherwise: Tensor) -> Tensor:
    """Columns x (K, n, 1) of norm 1; `otherwise` where x is zero."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(norm > 0, x / norm, otherwise)


@torch.no_grad()
def merge_pc_layers(model: Model) -> Model:
    """Write f(W) into the weight of every PC layer of `model`, in place, and return it.

    Its outputs stay as they are but for rounding, and its state dict is that of the model without
    PC layers. For averaged weights call `update_spectral_norms(model)` before: f is applied to the
    average of W, whose u and v are not the averages of u and v.
    """
    for layer in pc_layers(model).values():
        layer.weight.copy_(layer.effective_weight())
        del layer.weight_map
    return model
