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

Factors and inverses are float32, and float64 for weights in float64; of a wide factor only the
lower triangle is gathered, which is all that is read.
"""

import logging
import re
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from flowdopr.optim.conv import PatchCase
from flowdopr.optim.layers import LinearCase, add_gram
from flowdopr.optim.matrix import MatrixOptimizer, call_closure, decay_weights
from flowdopr.optim.moments import precision
from flowdopr.optim.roles import DECAYED, parameter_roles
from flowdopr.optim.world import is_sharded, summed, world_size

logger = logging.getLogger("flowdopr.optim")


class Hook:
    """The forward hook of one layer; inert once copied or unpickled.

    It hands over the layer's input when the gradient of its output arrives. Waiting for that keeps
    evaluation forwards out, and counts a checkpointed layer once: only one of its two forwards
    has an output that receives a gradient.
    """

    def __init__(
        self, optimizer: "KFAC | None" = None, weight: Tensor | None = None, group: int = 0
    ) -> None:
        self.optimizer = None if optimizer is None else weakref.ref(optimizer)
        self.weight, self.group = weight, group

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        reference, weight = self.optimizer, self.weight
        optimizer = reference() if reference else None
        if reference is None or optimizer is None or weight is None:
            return
        if not (output.requires_grad and weight.requires_grad):
            return
        if optimizer._is_due(weight, optimizer.param_groups[self.group]):
            inputs = (args[0] if args else kwargs["input"]).detach()

            def arrived(grad: Tensor) -> None:
                alive = reference()
                if alive is not None:
                    alive._gather(layer, weight, inputs, grad)

            output.register_hook(arrived)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()


class KFAC(MatrixOptimizer):
    """K-FAC for Linear layers and ungrouped convolutions, AdamW inside for everything else.

    A weight whose factors are not known, because no refresh has seen its layer's forward, takes
    the same step with G in place of M; the log names it once.

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
        if not (damping > 0 and 0 <= cov_decay < 1 and 0 < refresh_every == int(refresh_every)):
            raise ValueError(
                "kfac: damping must be positive, cov_decay in [0, 1), refresh_every whole and at "
                f"least 1, got {damping}, {cov_decay} and {refresh_every}"
            )
        if any(is_sharded(p) for p in model.parameters()):
            raise ValueError("kfac: takes whole weights, not FSDP's shards: use DDP, or 'dopr-sgd'")
        layers = _supported_layers(model)
        if not layers:
            raise ValueError("kfac: the model has no Linear or convolution for it: use adamw")
        roles = parameter_roles(model)
        unsupported = [
            f"^{re.escape(role.name)}$"
            for role in roles
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
        self._names: dict[Tensor, str] = {role.parameter: role.name for role in roles}
        self._reported: set[str] = set()
        self._sums: dict[Tensor, tuple[Tensor, Tensor, int]] = {}
        for index, group in enumerate(self.param_groups):
            for weight in group["params"] if group["gp"] == self.gp else ():
                hook = Hook(self, weight, index)
                handle = layers[weight].register_forward_hook(hook, with_kwargs=True)
                weakref.finalize(self, handle.remove)

    def _is_due(self, weight: Tensor, group: dict[str, Any]) -> bool:
        """Whether this step renews the weight's factors: at refreshes, and until it has some."""
        return group["steps"] % group["refresh_every"] == 0 or "inverse_a" not in self.state[weight]

    @torch.no_grad()
    def _gather(self, layer: nn.Module, weight: Tensor, inputs: Tensor, grad: Tensor) -> None:
        axes = len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0
        g = grad.movedim(-1 - axes, -1).reshape(-1, 1, 1, weight.shape[0])
        linear = LinearCase("full", 1, weight.shape[1])
        case = PatchCase(layer) if isinstance(layer, _ConvNd) else linear
        a, b, rows = self._sums.get(weight) or (*_no_sums(weight), 0)
        with torch.autocast(grad.device.type, enabled=False):
            rows += case.accumulate(a[None, None], inputs, None)
            add_gram(b[None, None], g)
        self._sums[weight] = (a, b, rows)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "KFAC holds hooks on its model and cannot be copied or pickled: save state_dict(), "
            "build a new KFAC on the other model and load it there"
        )

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
            if rows and (a.trace() + b.trace()).isfinite():  # of all ranks, so alike on each
                self._refresh(p, a / rows, b / rows, group)
            elif rows:
                name = self._names[p]
                logger.warning("weight %s: new factors are not finite, refresh skipped", name)
        for group in self.param_groups:
            group["steps"] += 1
        super().step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, which would round the factors to the precision of their weights."""
        super().load_state_dict(state_dict)
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if name.startswith(("factor_", "inverse_")):
                    self.state[p][name] = value.to(p.device, precision(p))

    def _matrix_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        momenta = self.buffers(params, "momentum_buffer")
        torch._foreach_mul_(momenta, group["momentum"])
        for p, momentum in zip(params, momenta, strict=True):
            momentum.add_(self._preconditioned(p))
        decay_weights(params, group)
        torch._foreach_add_(params, momenta, alpha=-group["lr"])

    def _preconditioned(self, p: Tensor) -> Tensor:
        """M, or G while the weight has no factors."""
        state, grad = self.state[p], p.grad
        assert grad is not None
        if "inverse_a" in state:
            matrix = grad.flatten(1).to(precision(p))
            return (state["inverse_b"] @ matrix @ state["inverse_a"]).reshape(p.shape)
        name = self._names[p]
        if name not in self._reported:
            self._reported.add(name)
            logger.warning(
                "weight %s: has a gradient but no factors; until a refresh gives it some, or for "
                "good if it is used without calling its module, it has SGD with momentum",
                name,
            )
        return grad

    def _pooled(self, weights: list[Tensor]) -> list[tuple[Tensor, Tensor, float]]:
        """What all ranks gathered for each weight: sums of z z^T and g g^T, and number of rows.

        Every rank takes part for every weight, with zeros where its layer did not run. DDP
        averages gradients, so a rank's own g is N times that of the whole batch.
        """
        if not weights:
            return []
        sums, rows = [], []
        for p in weights:
            a, b, n = self._sums.get(p) or (*_no_sums(p), 0)
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


def _no_sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros for the sums of z z^T and of g g^T."""
    d_out, d_in = weight.flatten(1).shape
    a, b = (weight.new_zeros(side, side, dtype=precision(weight)) for side in (d_in, d_out))
    return a, b


def _supported_layers(model: nn.Module) -> dict[Tensor, nn.Module]:
    """Weights that exactly one Linear or ungrouped convolution of `model` owns, and that owner.

    Without nn.MultiheadAttention's output projection, whose forward attention never calls.
    """
    owners: Counter[Tensor] = Counter()
    for module in model.modules():
        owners.update(module.parameters(recurse=False))
    bypassed = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return {
        module.weight: module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        or (
            isinstance(module, _ConvNd)
            and not isinstance(module, _ConvTransposeNd)
            and module.groups == 1
        )
        if owners[module.weight] == 1 and module not in bypassed
    }
