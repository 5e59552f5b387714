"""DoPr: activation preconditioning (AP) around any torch optimizer (arXiv 2606.06418).

    optimizer = DoPr(torch.optim.AdamW(model.parameters(), lr=1e-3), model)

For every layer y = W z the gradient G (d_out x d_in) is replaced by M = G S^-1,

    S = (Sigma / s + gamma I) / (1 + gamma),

with Sigma the second moment of z and s = tr(Sigma) / d_in its mean eigenvalue, and the wrapped
optimizer, the gradient preconditioner (GP), steps on M. The modules of this package:

    dopr         when what happens: the wrapper
    layers       which layer is preconditioned how
    views        a layer's input as rows of z, its gradient as a matrix (`conv_views`: convolutions)
    hooks        show layer inputs to the statistics
    statistics   gathers second moments and averages them
    inverse      the damped inverse of many matrices
    transforms   makes T of every layer and applies it
    processes    sums over processes
    reports      what is logged
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowdopr.linalg import full_float32, in_float32
from flowdopr.optim.base import Float32Optimizer
from flowdopr.optim.dopr.hooks import EffectiveWeightHook, register, unregister
from flowdopr.optim.dopr.inverse import Form
from flowdopr.optim.dopr.layers import (
    CONV_MODES,
    Defaults,
    Layer,
    LayerRule,
    find_layers,
    is_count,
    is_number,
    is_row_limit,
    row_limit,
)
from flowdopr.optim.dopr.reports import Diagnostics, Reporter
from flowdopr.optim.dopr.statistics import SecondMoment, Statistics
from flowdopr.optim.dopr.transforms import (
    apply,
    identity_transform,
    make_transforms,
    step_sandwich,
)

FORMS = ("inverse", "sandwich")
PC_GRADIENTS = ("raw", "effective")
# Optimizers, of torch and of other packages, whose steps depend on the weights themselves: on their
# norm, on a distance from where they started, on an average of them.
READS_WEIGHTS = re.compile(
    r"(?i)adafactor|asgd|lamb$|lars|larc|prodigy|dadapt|dowg|schedulefree|lookahead|a2grad|accsgd"
    r"|adasmooth|adalite|adamp$|amos|focus|ftrl|fromage|lorarite|madgrad|mars$|magma|nero|ranger"
    r"|sgdp|srmm|hyperball"
)
# Optimizers that evaluate the loss themselves, several times a step or for second derivatives.
EVALUATES_LOSS = re.compile(r"(?i)lbfgs|sam$|alig|adahessian|sophiah")


class DoPr(Float32Optimizer):
    """Wraps a constructed optimizer over `model`'s parameters with activation preconditioning.

    After a step `.grad` holds what the GP saw, M. `step` raises ValueError where two layers share a
    Sigma, because they read one tensor at the first refresh, and then read different ones.

    Args:
        optimizer: the GP. Its param_groups and state are shared: schedulers, GradScaler and
            accelerate see one optimizer.
        model: its Linear, Conv, ConvTranspose and Embedding layers are preconditioned, all other
            parameters get the GP alone. Give the bare model, before torch.compile and DDP, and
            after FSDP2's fully_shard.
        damping: gamma, relative to the mean eigenvalue of Sigma; or (first, last, steps), which
            goes geometrically from first to last. The larger it is, the less AP there is.
        cov_decay: decay of the average of Sigma per refresh; 0 keeps the newest refresh alone. At
            a layer's refresh k, from 0, it is at most (1 + k) / (10 + k), a warm-up.
        refresh_every: steps between refreshes of Sigma and its inverse. Statistics are gathered
            on refresh steps only, the first step always.
        form: with S = (Sigma / s + gamma I) / (1 + gamma), "inverse", GP(G S^-power), or
            "sandwich", GP(G L^-T) L^-1 with S = L L^T. Without damping, and with Muon or row
            normalisation as the GP, the direction of the sandwich's steps does not depend on the
            coordinates of z. Its weight decay is decoupled, whatever the GP's own.
        power: alpha of S^-alpha in the form "inverse"; 1 is the paper's.
        max_rows: rows of z that one forward contributes to a layer's Sigma, evenly spread; "all":
            every row.
        max_side: side of the widest Sigma. Wider layers fall into equal diagonal blocks, and so do
            layers that narrow to half or less (an MLP's second), as wide as their output.
        conv_mode: mode of convolutions that no rule decides, see `LayerRule`; "auto" takes "full"
            for patches of up to 128 coordinates and "sua-mean" for wider ones.
        pc_gradient: which gradient AP multiplies in a layer that computes with f(W), such as a PC
            layer: that of the "raw" W, or that of the "effective" weight f(W). The latter is
            multiplied within the backward pass, by the inverse of the last refresh (there is none
            in the first step), and the product then goes through f to W. So clipping acts on the
            product.
        rules: `LayerRule`s, or mappings of their fields. The first one whose pattern is found in
            the name of a layer decides how that layer is preconditioned.

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
        max_rows: int | str = 2048,
        max_side: int = 1280,
        conv_mode: str = "auto",
        pc_gradient: str = "raw",
        rules: Sequence[LayerRule | Mapping[str, Any]] = (),
    ) -> None:
        self._check_optimizer(optimizer, form)
        check = self._check
        check("cov_decay", cov_decay, is_number(cov_decay) and 0 <= cov_decay < 1, "in [0, 1)")
        check("form", form, form in FORMS, f"one of {', '.join(FORMS)}")
        check("power", power, is_number(power) and power > 0, "above 0 and finite")
        check("power", power, power == 1 or form == "inverse", "1 with form 'sandwich'")
        check("conv_mode", conv_mode, conv_mode in CONV_MODES, f"one of {', '.join(CONV_MODES)}")
        check("pc_gradient", pc_gradient, pc_gradient in PC_GRADIENTS, "raw or effective")
        in_step = pc_gradient == "raw" or form == "inverse"
        check("pc_gradient", pc_gradient, in_step, "raw with form 'sandwich', which acts on W")
        check("max_rows", max_rows, is_row_limit(max_rows), "1 or more, or 'all'")
        check("rules", rules, isinstance(rules, list | tuple), "a list of layer rules")
        for name, value in (("refresh_every", refresh_every), ("max_side", max_side)):
            check(name, value, is_count(value), "a whole number of 1 or more")
        self._damping = self._damping_schedule(damping)
        super().__init__([dict(group) for group in optimizer.param_groups], {})
        self.optimizer, self.refresh_every = optimizer, refresh_every
        self.form = Form(power, form == "sandwich")
        self._share_groups()
        self.steps = 0
        self._closed = False
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        effective = pc_gradient == "effective"
        defaults = Defaults(conv_mode, max_side, row_limit(max_rows), effective)
        self.found = find_layers(model, optimized, [LayerRule.of(rule) for rule in rules], defaults)
        self.statistics = Statistics(cov_decay)
        self._moments = [self._watch(layer, defaults) for layer in self.found.layers]
        self.transforms: list[Tensor | None] = []
        self._handle = register(self)
        hooks = self._precondition_effective()
        self.statistics.removable += hooks
        check("pc_gradient", pc_gradient, bool(hooks) == effective, "raw without PC layers")
        self._reporter = Reporter({layer.name: layer.weight for layer in self.found.layers})

    def roles(self) -> list[tuple[str, tuple[int, ...], str, str]]:
        """(name, shape, AP mode or "none", reason) of every parameter of the model."""
        return list(self.found.roles)

    def diagnostics(self) -> dict[str, Diagnostics]:
        """For each layer with a Sigma of its own, by name: the refreshes in its average, those that
        were skipped, and its damping. The host waits for these numbers."""
        return self.statistics.diagnostics()

    def _update_all(self) -> None:
        """Refresh Sigma if this is a refresh step, precondition, and let the GP step."""
        if self._closed:
            raise ValueError(
                "this DoPr was closed: step the optimizer inside it, or build a new one"
            )
        if self.statistics.gathering:
            self._refresh()
        # T is applied in the program's own precision of matrix products, as G was made.
        self._step_preconditioned(self._ready_layers())
        self.steps += 1
        self._set_gathering()

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

    def train(self) -> None:
        """Passed on to a GP that has two modes, such as a schedule-free one."""
        getattr(self.optimizer, "train", lambda: None)()

    def eval(self) -> None:
        """As `train`."""
        getattr(self.optimizer, "eval", lambda: None)()

    def close(self) -> None:
        """Remove every hook from the model. Afterwards `step` raises ValueError."""
        self._reporter.log_sent()
        self.statistics.remove_hooks()
        unregister(self._handle)
        self._closed = True

    # State

    def state_dict(self) -> dict[str, Any]:
        """The GP's state dict with one more entry, "dopr": `statistics_state_dict`."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = {**self.optimizer.state_dict(), "dopr": self.statistics_state_dict()}
        for after in self._optimizer_state_dict_post_hooks.values():
            state = after(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: it has no entry "dopr", or one of other layers or modes.
        """
        inner = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            inner = before(self, inner) or inner
        own = inner.pop("dopr", None)
        if own is None:
            raise ValueError(
                "the optimizer state has no entry 'dopr': a bare optimizer saved it, or torch's "
                "distributed checkpoint, which keeps the GP's part alone; load it into that one "
                "(`.optimizer`), or start the run anew"
            )
        with in_float32(self._parameters()):
            self.optimizer.load_state_dict(inner)
        self.load_statistics_state_dict(own)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def statistics_state_dict(self) -> dict[str, Any]:
        """What DoPr adds to the GP's state: the averages of Sigma, by layer name.

        It is the same on every rank and for any number of ranks. What was gathered since the last
        step is not part of it: save between steps.
        """
        self._reporter.log_sent()
        return {"steps": self.steps, **self.statistics.state_dict()}

    def load_statistics_state_dict(self, own: dict[str, Any]) -> None:
        """Restore what `statistics_state_dict` gave, after the GP's own state."""
        self.statistics.load_state_dict(own)
        self._share_groups()
        self.steps = own["steps"]
        # accelerate loads the state of an optimizer that has not stepped, and so decided nothing.
        self.statistics.sharing_decided = own["steps"] > 0
        self._reporter.start_from(self.diagnostics())
        self._set_gathering()
        with full_float32(), torch.no_grad():
            self.transforms = make_transforms(self.statistics, self.form, share_work=False)

    def __getstate__(self) -> dict[str, Any]:
        name = type(self).__name__
        raise TypeError(
            f"{name} holds hooks on its model and cannot be copied or pickled: save state_dict(), "
            f"build a new {name} on the other model and load it there"
        )

    def _share_groups(self) -> None:
        self.defaults = self.optimizer.defaults
        self.state, self.param_groups = self.optimizer.state, self.optimizer.param_groups

    # A step

    def _watch(self, layer: Layer, defaults: Defaults) -> SecondMoment:
        """The second moment of a layer's inputs, fed by every module that uses its weight."""
        given = layer.rule.max_rows
        rows = defaults.max_rows if given is None else row_limit(given)
        moment = SecondMoment(layer.name, layer.view, layer.weight, rows, layer.rule.pattern)
        for module, view in layer.modules:
            for part in view.parts():
                self.statistics.watch_inputs(moment, module, part)
        return moment

    def _precondition_effective(self) -> list[Any]:
        """Hook the maps of the layers whose effective gradient AP multiplies."""
        return [
            module.get_submodule("weight_map").register_forward_hook(
                EffectiveWeightHook(self._handle, number)
            )
            for number, layer in enumerate(self.found.layers)
            for module, _ in (layer.modules if layer.effective else [])
        ]

    @torch.no_grad()
    def precondition(self, index: int, grad: Tensor) -> Tensor:
        """The gradient of the effective weight of layer number `index` times its T."""
        transform = self.transform_of(self._moments[index])
        if transform is None:
            return grad
        return self.found.layers[index].view.multiply(grad, transform)

    def _damping_at(self, step: int) -> float:
        first, last, steps = self._damping
        return first * (last / first) ** min(1.0, step / steps) if first else first

    def _set_gathering(self) -> None:
        self.statistics.gathering = self.steps % self.refresh_every == 0
        self.statistics.turn = self.steps // self.refresh_every

    def _refresh(self) -> None:
        """Fold what was gathered into the averages and make T anew.

        The host does not wait: what the last refresh had to report is logged now.
        """
        self._reporter.log_sent()
        with full_float32():
            self.statistics.refresh()
            self.statistics.set_damping(self._damping_at(self.steps))
            self.transforms = make_transforms(self.statistics, self.form, share_work=True)
        known = [self.statistics.moments[i].name for i in self.statistics.known()]
        if known:
            self._reporter.send(known, self.statistics.table())
        for layer in self.found.frozen:
            if layer.weight.grad is not None:
                self._reporter.log_thawed(layer.name)

    def _ready_layers(self) -> list[tuple[Layer, Tensor]]:
        """The layers that have gradients, and their T."""
        ready = []
        for layer, moment in zip(self.found.layers, self._moments, strict=True):
            if layer.effective or layer.weight.grad is None:
                continue
            transform = self.transform_of(moment)
            if transform is None:
                self._reporter.log_unseen(layer.name)
                if not self.form.sandwich:
                    continue
                transform = identity_transform(moment)  # weight decay is decoupled here, too
            ready.append((layer, transform))
        return ready

    def transform_of(self, moment: SecondMoment) -> Tensor | None:
        """T of a layer, None before it has statistics."""
        owner = moment if moment.shared_with is None else moment.shared_with
        return self.transforms[owner.number] if self.transforms else None

    def _step_preconditioned(self, ready: list[tuple[Layer, Tensor]]) -> None:
        """Put M in place of G, and let the GP step."""
        apply(ready)
        if self.form.sandwich:
            step_sandwich(self.optimizer, ready)
        else:
            self.optimizer.step()

    # Arguments

    @classmethod
    def _check(cls, name: str, value: object, good: bool, allowed: str) -> None:
        if not good:
            raise ValueError(f"{cls.__name__}: {name} is {value}, it must be {allowed}")

    @classmethod
    def _damping_schedule(
        cls, damping: float | tuple[float, float, int]
    ) -> tuple[float, float, int]:
        """(first, last, steps) of a number or such a triple."""
        triple = damping if isinstance(damping, tuple | list) else (damping, damping, 1)
        known = len(triple) == 3 and all(is_number(value) for value in triple)
        cls._check("damping", damping, known, "a number or (first, last, steps)")
        first, last, steps = triple
        cls._check("damping", damping, min(first, last) >= 0, "0 or more")
        whole = is_count(steps)
        cls._check("damping", damping, whole, "(first, last, steps) with 1 or more whole steps")
        scheduled = first == last or min(first, last) > 0
        cls._check("damping", damping, scheduled, "above 0 to be scheduled")
        return first, last, steps

    @classmethod
    def _check_optimizer(cls, optimizer: torch.optim.Optimizer, form: str) -> None:
        """ValueError for an optimizer that cannot be wrapped, or not under this form."""
        kind = type(optimizer).__name__
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"DoPr: wraps a torch optimizer, got {kind}: DoPr(optimizer, model)")
        if isinstance(optimizer, DoPr):
            raise ValueError(
                f"DoPr: the optimizer is a {kind}, which preconditions by layer inputs already: "
                "wrap the one inside it (`.optimizer`)"
            )
        if EVALUATES_LOSS.search(kind):
            raise ValueError(
                f"DoPr: {kind} evaluates the loss itself within a step, and those gradients would "
                "not be preconditioned: wrap another optimizer"
            )
        if form == "sandwich" and (READS_WEIGHTS.search(kind) or hasattr(optimizer, "eval")):
            raise ValueError(
                f"DoPr: form 'sandwich' runs the optimizer from weights of zero, and {kind} reads "
                "them: use form 'inverse', or an optimizer such as SGD, AdamW or Muon"
            )
