"""What Muon and its relatives share: a method for matrices, and AdamW inside for all the rest.

Shapes: a matrix or convolution weight is seen as (blocks, rows, cols) with rows * blocks its first
axis and cols all other axes flattened; `fused_blocks` of the group says how many blocks.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from flowdopr.optim.base import Float32Optimizer, with_gradients
from flowdopr.optim.roles import parameter_groups, split_by_dimension

logger = logging.getLogger("flowdopr.optim")


class MatrixOptimizer(Float32Optimizer, ABC):
    """Base of optimizers that treat matrices by `_matrix_step` and everything else by AdamW.

    Every group carries "gp": the method's own name or "adamw". Given a model, the groups come from
    `parameter_groups`; given parameters or groups, tensors of two or more dimensions go to the
    method, unless a group names its "gp" itself or, as in Keller Jordan's code, has "use_muon".
    """

    gp: ClassVar[str]
    _warned = False

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        defaults: dict[str, Any],
        adamw_lr: float | None = None,
        adamw_for: Sequence[str] = (),
    ) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if not defaults[name] >= 0:
                raise ValueError(f"{self.gp}: {name}={defaults[name]} must not be negative")
        if adamw_lr is not None and not adamw_lr >= 0:
            raise ValueError(f"{self.gp}: adamw_lr={adamw_lr} must not be negative")
        steps = defaults.get("ns_steps", 1)
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"{self.gp}: ns_steps={steps} must be a whole number of 1 or more")
        for value in (*defaults["betas"], defaults["momentum"]):
            if not 0 <= value < 1:
                raise ValueError(f"{self.gp}: momentum and betas must lie in [0, 1), got {value}")
        if isinstance(params, nn.Module):
            decay = defaults["weight_decay"]
            params = parameter_groups(params, self.gp, weight_decay=decay, adamw_for=adamw_for)
        elif adamw_for:
            raise ValueError(f"{self.gp}: adamw_for needs a model, not a list of parameters")
        super().__init__(params, {"fused_blocks": 1, "adamw_lr": adamw_lr, **defaults})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; a group that does not say which method updates it is parted in two, tensors
        of two or more dimensions for this one and the rest for AdamW.

        Raises:
            ValueError: a method that does not fit the parameters. The optimizer is as before.
        """
        given = dict(param_group)
        if "use_muon" in given:  # as in Keller Jordan's code
            given.setdefault("gp", self.gp if given["use_muon"] else "adamw")
        super().add_param_group(given)
        group = self.param_groups.pop()
        parts = [group] if "gp" in group else split_by_dimension(group, self.gp)
        adamw_lr = group.pop("adamw_lr")
        for part in parts:
            part.pop("adamw_lr", None)
            if part["gp"] == "adamw" and adamw_lr is not None and "lr" not in param_group:
                part["lr"] = adamw_lr
            self._check_group(part)
        self.param_groups += parts
        if len(parts) > 1 and not self._warned:
            self._warned = True
            logger.warning(
                "%s: it was given parameters instead of a model, so it cannot tell embeddings and "
                "output heads from other matrices, and updates them as well: give it the model, or "
                "groups with gp='%s' and gp='adamw'",
                self.gp,
                self.gp,
            )

    def _check_group(self, group: dict[str, Any]) -> None:
        if group["gp"] not in (self.gp, "adamw"):
            raise ValueError(f"gp='{group['gp']}': a group's gp is '{self.gp}' or 'adamw'")
        for p in group["params"] if group["gp"] == self.gp else ():
            if p.ndim < 2 or p.shape[0] % group["fused_blocks"]:
                raise ValueError(
                    f"{self.gp} takes matrices whose rows fused_blocks={group['fused_blocks']} "
                    f"divides, got shape {tuple(p.shape)}: use gp='adamw' for it"
                )

    def _update_all(self) -> None:
        for group in self.param_groups:
            params = with_gradients(group["params"])
            if not params:
                continue
            if group["gp"] == "adamw":
                self._adamw_step(params, group)
            else:
                self._matrix_step(params, group)

    @abstractmethod
    def _matrix_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update `params`, which all have gradients, by the method's rule."""

    def _adamw_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """torch's own AdamW arithmetic on this optimizer's state."""
        for p in params:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.tensor(0.0, device="cpu")  # as torch has it
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            self.buffers(params, "exp_avg"),
            self.buffers(params, "exp_avg_sq"),
            [],
            [self.state[p]["step"] for p in params],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def buffers(self, params: list[Tensor], name: str) -> list[Tensor]:
        """The state tensors called `name`, zeros of the parameter's shape on first use."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [self.state[p][name] for p in params]

    def momentum(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """B <- m B + (1 - m) G; returns B, or (1 - m) G + m B in groups with "nesterov"."""
        grads = [p.grad for p in params if p.grad is not None]
        momenta = self.buffers(params, "momentum_buffer")
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        if group.get("nesterov"):
            updates = torch._foreach_mul(momenta, group["momentum"])
            torch._foreach_add_(updates, grads, alpha=1 - group["momentum"])
            return list(updates)
        return momenta
