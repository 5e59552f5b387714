"""DoPr: activation preconditioning around any torch optimizer (arXiv 2606.06418).

    optimizer = DoPr(torch.optim.AdamW(model.parameters(), lr=1e-3), model)

For every layer y = W z the gradient G is replaced by M = G (Sigma + gamma tr(Sigma)/d I)^-1, with
Sigma the second moment of z, and the wrapped optimizer, the gradient preconditioner (GP), steps
on M. `preconditioner` holds the matrices, `layers` and `conv` the layers, `statistics` the hooks.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowdopr.optim.distributed import local, sum_piles
from flowdopr.optim.plan import LayerRule, make_plan
from flowdopr.optim.preconditioner import Form, full_precision, invert
from flowdopr.optim.statistics import Pile, Statistic, Statistics

logger = logging.getLogger("flowdopr.optim")


class DoPr(torch.optim.Optimizer):
    """Wraps a constructed optimizer over `model`'s parameters with activation preconditioning.

    optimizer: the GP. Its param_groups and state are shared: schedulers, GradScaler and
        accelerate see one optimizer.
    model: whose Linear, Conv and Embedding layers are preconditioned; every other parameter
        gets the GP alone. Wrap the model before torch.compile, DDP or after FSDP2's fully_shard.
    damping: gamma, relative to the mean eigenvalue of Sigma.
    cov_decay: decay of the average of Sigma per refresh; 0 keeps the last refresh alone.
    refresh_every: steps between refreshes of Sigma and its inverse. Statistics are gathered on
        refresh steps only, the first step always.
    max_rows: rows of z one forward contributes to a layer, evenly spread; None takes all.
    max_side: side of the widest Sigma; wider layers fall into equal diagonal blocks.
    rules: `LayerRule`s by name, the first match wins.
    max_nonfinite: consecutive refreshes with a non-finite Sigma after which step raises.

    Raises ValueError for settings out of range, a trainable layer weight that the optimizer lacks,
    a rule that decides nothing, and a model without a layer to precondition.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        damping: float = 0.1,
        cov_decay: float = 0.95,
        refresh_every: int = 16,
        max_rows: int | None = 4096,
        max_side: int = 1280,
        rules: Sequence[LayerRule] = (),
        unit_scale: bool = True,
        max_nonfinite: int = 10,
    ) -> None:
        _check_range("damping", damping, damping >= 0, "0 or more")
        _check_range("cov_decay", cov_decay, 0 <= cov_decay < 1, "0 or more and below 1")
        _check_range("refresh_every", refresh_every, refresh_every >= 1, "1 or more")
        _check_range("max_rows", max_rows, max_rows is None or max_rows >= 1, "1 or more, or None")
        _check_range("max_side", max_side, max_side >= 1, "1 or more")
        super().__init__([dict(group) for group in optimizer.param_groups], {})
        self.optimizer = optimizer
        self._share()
        self.damping, self.cov_decay, self.refresh_every = damping, cov_decay, refresh_every
        self.max_nonfinite = max_nonfinite
        self.form = Form(unit_scale=unit_scale)
        self.steps = 0
        self.raised_damping: dict[str, float] = {}
        self.skipped_refreshes: dict[str, int] = {}
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        plan = make_plan(model, optimized, rules, max_side)
        self._roles, self._layers = plan.roles, plan.layers
        self.statistics = Statistics()
        self._transforms: list[Tensor | None] = [None] * len(plan.layers)
        for layer in plan.layers:
            rows = max_rows if layer.rule.max_rows is None else layer.rule.max_rows
            statistic = Statistic(layer.name, layer.case, layer.parameters[0], rows)
            self.statistics.all.append(statistic)
            for module, case in layer.readers:
                self.statistics.watch(module, layer.parameters[0], statistic, case)

    def roles(self) -> list[tuple[str, tuple[int, ...], str, str]]:
        """(name, shape, AP mode or "none", reason) of every parameter of the model."""
        return list(self._roles)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Refresh Sigma if this is a refresh step, precondition, and let the GP step.

        Gradients are given back as they were. Raises FloatingPointError after `max_nonfinite`
        refreshes in a row with activations that are not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with full_precision():
            if self.statistics.gathering:
                self._refresh()
            originals = self._precondition()
        try:
            self.optimizer.step()
        finally:
            for parameter, grad in originals:
                parameter.grad = grad
        self.steps += 1
        self.statistics.gathering = self.steps % self.refresh_every == 0
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and the statistics of a backward whose step never came."""
        if self.statistics.gathering:
            self.statistics.discard()
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: the roles of all parameters are decided at the start."""
        if hasattr(self, "optimizer"):
            raise ValueError(
                "DoPr decides every parameter's role when it is built: add the parameter group to "
                "the wrapped optimizer first, then build DoPr"
            )
        super().add_param_group(param_group)

    def close(self) -> None:
        """Remove every hook from the model; the optimizer must not step any more."""
        self.statistics.remove_hooks()

    def state_dict(self) -> dict[str, Any]:
        """The GP's state dict with one more entry, "dopr": the averages of Sigma, by layer name.

        What was gathered since the last step is not part of it: save between steps.
        """
        averages = {}
        for statistic in self.statistics.all:
            if statistic.sigma is not None:
                averages[statistic.name] = {
                    "sigma": _pack(statistic.sigma),
                    "weight": statistic.weight,
                }
        own = {"steps": self.steps, "averages": averages}
        return {**self.optimizer.state_dict(), "dopr": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. ValueError if it is not of a DoPr of these layers."""
        inner = dict(state_dict)
        if "dopr" not in inner:
            raise ValueError(
                "the optimizer state has no entry 'dopr': it was saved by a bare optimizer; "
                "load it into that one, or start the run anew"
            )
        own = inner.pop("dopr")
        names = {statistic.name for statistic in self.statistics.all}
        unknown = sorted(set(own["averages"]) - names)
        if unknown:
            raise ValueError(
                f"the optimizer state has statistics of layer {unknown[0]!r}, which this model "
                "lacks: load it into the model and rules it was saved with"
            )
        self.optimizer.load_state_dict(inner)
        self._share()
        self.steps = own["steps"]
        self.statistics.gathering = self.steps % self.refresh_every == 0
        for statistic in self.statistics.all:
            saved = own["averages"].get(statistic.name)
            statistic.close()
            statistic.sigma = None if saved is None else _unpack(saved["sigma"], statistic)
            statistic.weight = 0.0 if saved is None else saved["weight"]
        with full_precision(), torch.no_grad():
            self._invert()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "DoPr holds hooks on its model and cannot be copied or pickled: save state_dict(), "
            "build a new DoPr on the other model and load it there"
        )

    def _share(self) -> None:
        self.defaults = self.optimizer.defaults
        self.state, self.param_groups = self.optimizer.state, self.optimizer.param_groups

    def _refresh(self) -> None:
        """End the window, average its Sigma over ranks and time, and invert."""
        statistics = self.statistics.all
        piles = self.statistics.close()
        sum_piles(statistics, piles)
        self._average(statistics, piles)
        self._invert()

    def _average(self, statistics: list[Statistic], piles: list[Pile]) -> None:
        """Fold finite sums into the running averages. One host synchronisation."""
        ran = [(s, p, p.sums) for s, p in zip(statistics, piles, strict=True) if p.sums is not None]
        if not ran:
            return
        totals = [sums.diagonal(dim1=-2, dim2=-1).sum().double() for _, _, sums in ran]
        finite = torch.stack([total.to(totals[0].device) for total in totals]).isfinite().tolist()
        for (statistic, pile, sums), good in zip(ran, finite, strict=True):
            if good:
                statistic.average(sums.div_(pile.count), self.cov_decay)
                statistic.skipped_in_a_row = 0
            else:
                self._skip(statistic)

    def _skip(self, statistic: Statistic) -> None:
        name = statistic.name
        statistic.skipped_in_a_row += 1
        self.skipped_refreshes[name] = self.skipped_refreshes.get(name, 0) + 1
        logger.warning(
            "layer %s: inputs are not finite, refresh at step %d skipped", name, self.steps
        )
        if statistic.skipped_in_a_row >= self.max_nonfinite:
            raise FloatingPointError(
                f"layer {name!r}: inputs were not finite on {self.max_nonfinite} refreshes in a "
                "row; lower the learning rate or check the data"
            )

    def _invert(self) -> None:
        ready = [i for i, s in enumerate(self.statistics.all) if s.sigma is not None]
        stacks = []
        for i in ready:
            statistic = self.statistics.all[i]
            assert statistic.sigma is not None
            stacks.append(statistic.case.stack(statistic.sigma / statistic.weight))
        inverses = invert(stacks, self.damping, self.form)
        for position, i in enumerate(ready):
            self._transforms[i] = inverses.transforms[position]
        for position, damping in inverses.raised.items():
            name = self.statistics.all[ready[position]].name
            if self.raised_damping.get(name) != damping:
                logger.warning("layer %s: damping raised to %.1e to factor Sigma", name, damping)
            self.raised_damping[name] = damping

    def _precondition(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Put M in place of G; returns the gradients to give back."""
        originals = []
        for layer, transform in zip(self._layers, self._transforms, strict=True):
            grads = [parameter.grad for parameter in layer.parameters]
            present = [grad for grad in grads if grad is not None]
            if transform is None or len(present) < len(grads):
                continue
            products = layer.case.multiply([local(grad) for grad in present], transform)
            for parameter, grad, product in zip(layer.parameters, present, products, strict=True):
                originals.append((parameter, grad))
                parameter.grad = product
        return originals


def _check_range(name: str, value: object, good: bool, allowed: str) -> None:
    if not good:
        raise ValueError(f"DoPr: {name} is {value}, it must be {allowed}")


def _pack(sigma: Tensor) -> Tensor:
    """The lower triangles of (G, B, s, s), all that the inversion reads, as (G, B, s(s+1)/2)."""
    rows, columns = torch.tril_indices(*sigma.shape[-2:], device=sigma.device)
    return sigma[:, :, rows, columns]


def _unpack(packed: Tensor, statistic: Statistic) -> Tensor:
    sigma = torch.zeros(statistic.case.shape, dtype=statistic.dtype, device=statistic.device)
    rows, columns = torch.tril_indices(*sigma.shape[-2:], device=sigma.device)
    sigma[:, :, rows, columns] = packed.to(sigma)
    return sigma
