"""DoPr: activation preconditioning around any torch optimizer (arXiv 2606.06418).

    optimizer = DoPr(torch.optim.AdamW(model.parameters(), lr=1e-3), model)

For every layer y = W z the gradient G is replaced by M = G (Sigma / m + gamma I)^-1, with Sigma the
second moment of z and m = tr(Sigma)/d, and the wrapped optimizer, the gradient preconditioner (GP),
steps on M. This file says when; `plan` says which layer how, `layers` and `conv` know the layers,
`statistics` has the hooks, `preconditioner` and `inverse` the matrices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowdopr.linalg import full_float32
from flowdopr.optim.apply import apply
from flowdopr.optim.arguments import (
    check,
    check_anneal,
    check_dual,
    check_optimizer,
    check_whole,
    damping_schedule,
    is_number,
    layer_rules,
    row_limit,
)
from flowdopr.optim.inverse import Form
from flowdopr.optim.matrix import call_closure
from flowdopr.optim.moments import Statistic
from flowdopr.optim.plan import CONV_MODES, Defaults, Layer, LayerRule, make_plan
from flowdopr.optim.preconditioner import Preconditioner
from flowdopr.optim.sandwich import step_sandwich
from flowdopr.optim.statistics import Statistics

FORMS = ("inverse", "sandwich")


class DoPr(torch.optim.Optimizer):
    """Wraps a constructed optimizer over `model`'s parameters with activation preconditioning.

    Args:
        optimizer: the GP. Its param_groups and state are shared: schedulers, GradScaler and
            accelerate see one optimizer.
        model: its Linear, Conv, ConvTranspose and Embedding layers are preconditioned, all other
            parameters get the GP alone. Give the bare model, before torch.compile and DDP, and
            after FSDP2's fully_shard.
        damping: gamma, relative to the mean eigenvalue of Sigma; or (first, last, steps), which
            goes geometrically from first to last.
        cov_decay: decay of the average of Sigma per refresh; 0 keeps the last refresh alone. At
            a layer's refresh k, from 0, it is at most (1 + k) / (10 + k), a warm-up.
        refresh_every: steps between refreshes of Sigma and its inverse. Statistics are gathered
            on refresh steps only, the first step always.
        form: "inverse", M = GP(G S^-power), or "sandwich", GP(G L^-T) L^-1 with S = L L^T, whose
            steps do not depend on the coordinates of z where the GP is Muon or row
            normalisation. Under the sandwich weight decay is decoupled, whatever the GP's own.
        power: alpha of S^-alpha; 1 is the paper's.
        anneal: (first, last) steps between which AP fades linearly into the bare GP; None never.
        max_rows: rows of z one forward contributes to a layer, evenly spread; "all" or None
            takes every one.
        max_side: side of the widest Sigma; wider layers fall into equal diagonal blocks, and so
            do layers that narrow to half or less (an MLP's second), as wide as their output.
        max_patch: widest convolution patch with a full Sigma; wider ones take "sua-mean".
        conv_mode: mode of convolutions that no rule decides, see `LayerRule`.
        bias: give Linear layers their bias as one more coordinate of z, which centres Sigma.
        rules: `LayerRule`s, or mappings of their fields, by name; the first match wins.
        unit_scale: divide Sigma by its mean eigenvalue before it is inverted.
        max_nonfinite: consecutive refreshes with non-finite inputs after which `step` raises.

    Raises:
        ValueError: a setting out of range, a trainable layer weight that the optimizer lacks, a
            rule that decides nothing, or a model without a layer to precondition.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        damping: float | tuple[float, float, int] = 0.1,
        cov_decay: float = 0.95,
        refresh_every: int = 16,
        form: str = "inverse",
        power: float = 1.0,
        anneal: tuple[int, int] | None = None,
        max_rows: int | str | None = 2048,
        max_side: int = 1280,
        max_patch: int = 128,
        conv_mode: str = "auto",
        bias: bool = False,
        rules: Sequence[LayerRule | Mapping[str, Any]] = (),
        unit_scale: bool = True,
        max_nonfinite: int = 10,
    ) -> None:
        check_optimizer(optimizer, form)
        self._damping = damping_schedule(damping)
        decays = is_number(cov_decay) and 0 <= cov_decay < 1
        check("cov_decay", cov_decay, decays, "0 or more and below 1")
        check_whole("refresh_every", refresh_every)
        check("form", form, form in FORMS, f"one of {', '.join(FORMS)}")
        check("power", power, is_number(power) and power > 0, "above 0 and finite")
        check("power", power, power == 1 or form == "inverse", "1 with form 'sandwich'")
        check_anneal(anneal)
        self._anneal = anneal
        check_whole("max_side", max_side)
        check_whole("max_patch", max_patch)
        check_whole("max_nonfinite", max_nonfinite)
        check("conv_mode", conv_mode, conv_mode in CONV_MODES, f"one of {', '.join(CONV_MODES)}")
        super().__init__([dict(group) for group in optimizer.param_groups], {})
        self.optimizer, self.refresh_every = optimizer, refresh_every
        self._share()
        self.steps = self._refreshed_at = 0
        self._closed = False
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.plan = make_plan(
            model, optimized, layer_rules(rules), Defaults(conv_mode, bias, max_side, max_patch)
        )
        plain = form == "inverse" and power == 1
        check_dual(self.plan.layers, plain, min(self._damping[:2]))
        self.statistics = Statistics()
        for layer in self.plan.layers:
            rows = row_limit(max_rows if layer.rule.max_rows is None else layer.rule.max_rows)
            statistic = Statistic(layer.name, layer.case, layer.parameters[0], rows)
            self.statistics.all.append(statistic)
            for module, case in layer.readers:
                self.statistics.watch(module, layer.parameters[0], statistic, case)
        self.preconditioner = Preconditioner(
            self.statistics.all,
            Form(power, form == "sandwich", unit_scale),
            cov_decay,
            max_nonfinite,
        )

    def roles(self) -> list[tuple[str, tuple[int, ...], str, str]]:
        """(name, shape, AP mode or "none", reason) of every parameter of the model."""
        return list(self.plan.roles)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Refresh Sigma if this is a refresh step, precondition, and let the GP step.

        Afterwards `.grad` holds what the GP saw, M. Raises FloatingPointError at the refresh after
        `max_nonfinite` in a row with activations that are not finite.
        """
        if self._closed:
            raise ValueError(
                "this DoPr was closed: step the optimizer inside it, or build a new one"
            )
        loss = call_closure(closure)
        if self.statistics.gathering:
            self._refresh()
        elif self._schedule(self.steps)[1] == 0:  # AP has faded, and no refresh will come
            self.preconditioner.news.tell_and_stop()
        ready = self._precondition()  # in the program's own precision, as G was made
        if self.preconditioner.form.sandwich:
            step_sandwich(self.optimizer, ready)
        else:
            self.optimizer.step()
        self.steps += 1
        self._set_gathering()
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
        """Remove every hook from the model; the optimizer steps no more."""
        self.preconditioner.news.tell()
        self.statistics.remove_hooks()
        self._closed = True

    def state_dict(self) -> dict[str, Any]:
        """The GP's state dict with one more entry, "dopr": `statistics_state_dict`."""
        return {**self.optimizer.state_dict(), "dopr": self.statistics_state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. ValueError if it is not of a DoPr of these layers."""
        inner = dict(state_dict)
        own = inner.pop("dopr", None)
        if own is None:
            raise ValueError(
                "the optimizer state has no entry 'dopr': a bare optimizer saved it, or torch's "
                "distributed checkpoint, which keeps the GP's part alone; load it into that one "
                "(`.optimizer`), or start the run anew"
            )
        self.optimizer.load_state_dict(inner)
        self.load_statistics_state_dict(own)

    def statistics_state_dict(self) -> dict[str, Any]:
        """What DoPr adds to the GP's state: the averages of Sigma, by layer name.

        It is the same on every rank and for any number of ranks. What was gathered since the last
        step is not part of it: save between steps.
        """
        return {
            "steps": self.steps,
            "refreshed_at": self._refreshed_at,
            "parting": self.statistics.voted(),
            **self.preconditioner.state_dict(),
        }

    def load_statistics_state_dict(self, own: dict[str, Any]) -> None:
        """Restore what `statistics_state_dict` gave, after the GP's own state."""
        self.preconditioner.load_state_dict(own)
        self._share()
        self.steps, self._refreshed_at = own["steps"], own["refreshed_at"]
        # Accelerate loads the state of an optimizer that has not stepped: nothing is paired yet.
        self.statistics.pairing = own["steps"] == 0
        self.statistics.load_voted(own["parting"])
        self._set_gathering()
        with full_float32(), torch.no_grad():
            self.preconditioner.invert(self._schedule(self._refreshed_at)[1], share=False)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "DoPr holds hooks on its model and cannot be copied or pickled: save state_dict(), "
            "build a new DoPr on the other model and load it there"
        )

    def _share(self) -> None:
        self.defaults = self.optimizer.defaults
        self.state, self.param_groups = self.optimizer.state, self.optimizer.param_groups

    def _schedule(self, step: int) -> tuple[float, float]:
        """(damping, strength of AP) at a step."""
        first, last, steps = self._damping
        damping = first * (last / first) ** min(1.0, step / steps) if first else first
        if self._anneal is None:
            return damping, 1.0
        begin, end = self._anneal
        return damping, min(1.0, max(0.0, (end - step) / (end - begin)))

    def _set_gathering(self) -> None:
        _, strength = self._schedule(self.steps)
        self.statistics.gathering = strength > 0 and self.steps % self.refresh_every == 0

    def _refresh(self) -> None:
        self._refreshed_at = self.steps
        piles = self.statistics.close()
        self.statistics.pair()
        self.statistics.part()
        with full_float32():
            self.preconditioner.refresh(piles, *self._schedule(self.steps))
        for layer in self.plan.frozen:
            if layer.parameters[0].grad is not None:
                self.preconditioner.news.report_thawed(layer.name)

    def _precondition(self) -> list[tuple[Layer, Tensor]]:
        """Put M, or G T, in place of G; returns the layers and the T they had."""
        ready = []
        _, strength = self._schedule(self.steps)
        for layer, statistic in zip(self.plan.layers, self.statistics.all, strict=True):
            transform = (statistic.twin or statistic).transform
            if strength == 0 or any(p.grad is None for p in layer.parameters):
                continue
            if transform is None:
                self.preconditioner.news.report_unseen(layer.name)
                if not self.preconditioner.form.sandwich:
                    continue
                transform = statistic.identity()  # whatever T is, weight decay is decoupled
            ready.append((layer, transform))
        apply(ready)
        return ready
