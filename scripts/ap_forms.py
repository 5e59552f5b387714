"""Which form of activation preconditioning (AP) draws the better images, before one optimizer?

    python scripts/ap_forms.py CONFIG --gp muon --lr 1e-2 --out ap-forms [section.key=value ...]
    python scripts/ap_forms_report.py ap-forms/runs.jsonl

Each variant differs from the reference `BASE` in one thing: an option of DoPr, or a probe, that is
something that the package does not offer because nothing has supported it. All variants and the
optimizer alone train with one learning rate, on the same seeds, so with the same batches, noise and
times, and are evaluated as the config says. Finished runs in the results file are not repeated.
"""

import argparse
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from flowdopr.config import Config, load_config
from flowdopr.data import Datasets
from flowdopr.data.files import ImageFiles
from flowdopr.data.loader import in_memory
from flowdopr.disk import to_json
from flowdopr.evaluate import Evaluator
from flowdopr.flow import Draw, FlowMatching, TimeSampler, build_objective
from flowdopr.latents import build_datasets
from flowdopr.optim import DoPr
from flowdopr.optim.dopr.layers import Layer
from flowdopr.optim.dopr.transforms import apply
from flowdopr.runs import RunFolder
from flowdopr.train import TrainingFailed, train

CONDITION = ("condition", "modulation")
WITH_CONDITION = {"pattern": "|".join(CONDITION)}  # DoPr's default leaves these layers to the GP
BASE = {"damping": 1.0, "rules": [WITH_CONDITION]}
"""The reference: the form "inverse" with a constant damping, for every layer."""


class EarlierBatches(DoPr):
    """A probe: the gradient of a batch is preconditioned by moments of earlier batches alone, so
    that noise in Sigma is independent of that in the gradient."""

    def _update_all(self) -> None:
        self._step_preconditioned(self._ready_layers())
        if self.statistics.gathering:
            self._refresh()
        self.steps += 1
        self._set_gathering()


class Growing(DoPr):
    """A probe: T is (Sigma / s + gamma I)^-1, so that gradients grow while the damping falls. To
    Adam, whose second moment is late, gradients that grow are a higher learning rate."""

    def _refresh(self) -> None:
        super()._refresh()
        scale = (1 + self._damping_at(self.steps)) ** self.form.power
        self.transforms = [None if t is None else t / scale for t in self.transforms]


class FadesOut(DoPr):
    """A probe: (Sigma / s + gamma I)^-1 gives way to the identity, linearly from a step on."""

    BEGIN, END = 0, 600

    def _refresh(self) -> None:
        super()._refresh()
        strength = (self.END - self.steps) / (self.END - self.BEGIN)
        strength = min(1.0, max(0.0, strength))
        scale = 1 + self._damping_at(self.steps)
        self.transforms = [
            None
            if t is None
            else strength / scale * t + (1 - strength) * torch.eye(t.shape[-1]).expand_as(t)
            for t in self.transforms
        ]


class FadesOutLate(FadesOut):
    BEGIN = 300


class SameLength(DoPr):
    """A probe: each layer's M has the length of its G, so that AP changes directions alone."""

    def _step_preconditioned(self, ready: list[tuple[Layer, Tensor]]) -> None:
        lengths = [layer.weight.grad.norm() for layer, _ in ready]  # pyright: ignore
        apply(ready)
        for (layer, _), length in zip(ready, lengths, strict=True):
            gradient = layer.weight.grad
            gradient *= length / gradient.norm().clamp_min(1e-30)  # pyright: ignore
        self.optimizer.step()


class GrowingAlone(DoPr):
    """A control of `Growing`: T is the identity over 1 + gamma. There is no AP."""

    def _refresh(self) -> None:
        super()._refresh()
        scale = 1 + self._damping_at(self.steps)
        self.transforms = [
            None if t is None else torch.eye(t.shape[-1]).expand_as(t) / scale
            for t in self.transforms
        ]


class AfterMomentum(DoPr):
    """A probe for Muon: momentum accumulates G, and T is applied to the momentum."""

    def _step_preconditioned(self, ready: list[tuple[Layer, Tensor]]) -> None:
        transforms = {id(layer.weight): (layer, t) for layer, t in ready}
        momentum = self.optimizer.momentum

        def preconditioned(params: list[Tensor], group: dict[str, Any]) -> Sequence[Tensor]:
            updates = list(momentum(params, group))
            for number, parameter in enumerate(params):
                if id(parameter) in transforms:
                    layer, transform = transforms[id(parameter)]
                    updates[number] = layer.view.multiply(updates[number], transform)
            return updates

        with patch.object(self.optimizer, "momentum", preconditioned):
            self.optimizer.step()


@dataclass
class Bands:
    """What a linear layer's weight (out, in) has for each band of times."""

    gradient: Tensor  # (bands, out, in), of this step
    sums: Tensor  # (bands, in, in), of z z^T since the last refresh
    rows: Tensor  # (bands,)
    sigma: Tensor | float = 0.0  # (bands, in, in), their average, times the sum of its weights
    transform: Tensor | None = None  # (bands, in, in)


class TimeBands(DoPr):
    """A probe: T by bands of times, M = sum_b G_b (Sigma_b / s_b + gamma I)^-1.

    G_b is the part of the gradient that comes from images at times of the band b, and Sigma_b the
    second moment of inputs at those times. For linear layers; embeddings have one T for all times.
    """

    BANDS = 4

    @wraps(DoPr.__init__)
    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, **options: Any) -> None:
        super().__init__(optimizer, model, **options)
        self.damping = options["damping"]
        self.bands: dict[int, Bands] = {}
        self.band = torch.empty(0)
        model.register_forward_pre_hook(self._note_times)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._follow)

    def _note_times(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.band = (args[1] * self.BANDS).long().clamp_max(self.BANDS - 1)

    def _follow(self, module: nn.Linear, args: tuple[Tensor, ...], y: Tensor) -> None:
        if module.training and y.requires_grad:
            weight, z, band = module.weight, args[0].detach(), self.band
            y.register_hook(lambda gradient: self._gather(weight, z, gradient, band))

    def _gather(self, weight: Tensor, z: Tensor, gradient: Tensor, band: Tensor) -> None:
        square = (self.BANDS, z.shape[-1], z.shape[-1])
        found = self.bands.get(id(weight))
        if found is None:
            gradients = weight.new_zeros(self.BANDS, *weight.shape)
            found = Bands(gradients, z.new_zeros(square), z.new_zeros(self.BANDS))
            self.bands[id(weight)] = found
        for number in range(self.BANDS):
            rows = z[band == number].flatten(0, -2)
            found.gradient[number] += gradient[band == number].flatten(0, -2).T @ rows
            if self.statistics.gathering:
                found.sums[number] += rows.T @ rows
                found.rows[number] += len(rows)

    def _step_preconditioned(self, ready: list[tuple[Layer, Tensor]]) -> None:
        others = []
        for layer, transform in ready:
            weight = layer.weight
            bands = self.bands.get(id(weight))
            if bands is None:
                others.append((layer, transform))
                continue
            if self.statistics.gathering:
                self._refresh_bands(bands)
            whole = bands.gradient.sum(0)
            # 1, but for clipping; a zero gradient stays one
            clipped = weight.grad.norm() / whole.norm().clamp_min(1e-30)  # pyright: ignore
            weight.grad.copy_((bands.gradient @ bands.transform).sum(0) * clipped)  # pyright: ignore
            bands.gradient.zero_()
        super()._step_preconditioned(others)

    def _refresh_bands(self, bands: Bands) -> None:
        """As DoPr does: an average that warms up, over its mean eigenvalue."""
        refresh = self.steps // self.refresh_every
        decay = min(self.statistics.cov_decay, (1 + refresh) / (10 + refresh))
        sigma = bands.sums / bands.rows[:, None, None].clamp_min(1)
        bands.sigma = average = decay * bands.sigma + (1 - decay) * sigma
        mean = average.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        identity = torch.eye(sigma.shape[-1], dtype=sigma.dtype)
        bands.transform = torch.linalg.inv(average / mean + self.damping * identity)
        bands.sums.zero_()
        bands.rows.zero_()


class MomentsAtOtherTimes:
    """A probe: a flow-matching objective whose layers' second moments are those of another forward
    of the same images, with noise at times from `sampler`."""

    def __init__(self, objective: FlowMatching, sampler: TimeSampler) -> None:
        self.objective, self.sampler = objective, sampler
        self.generator = torch.Generator().manual_seed(0)
        self.class_dropout_prob = objective.class_dropout_prob

    def draw(self, *args: Any, **options: Any) -> Draw:
        return self.objective.draw(*args, **options)

    def __call__(self, model: Any, x_1: Tensor, y: Tensor | None, draw: Draw) -> Tensor:
        if not model.training:
            return self.objective(model, x_1, y, draw)
        # DoPr gathers the inputs of forwards in train mode alone.
        t = self.sampler(len(x_1), self.generator, self.objective.path)
        self.objective(model, x_1, y, Draw(draw.x_0, t.to(draw.t), draw.keep, draw.u))
        model.eval()
        losses = self.objective(model, x_1, y, draw)
        model.train()
        return losses


@dataclass(frozen=True)
class Variant:
    """DoPr's options beside or in place of BASE's, or None for the optimizer alone; and a probe."""

    options: Mapping[str, Any] | None = field(default_factory=dict)
    dopr: type[DoPr] = DoPr
    times: TimeSampler | None = None


def without(*patterns: str) -> dict[str, Any]:
    """AP for all layers but those whose names match a pattern."""
    left_out = {"pattern": "|".join(patterns), "mode": "none"}
    others = [] if set(CONDITION) <= set(patterns) else [WITH_CONDITION]
    return {"rules": [left_out, *others]}


def growing(first: float, last: float, share: float = 0.5, **options: Any) -> Variant:
    """A damping that falls in a share of the run, and gradients that grow with it."""
    return Variant({"damping": (first, last, share), **options}, Growing)


def same_length(first: float, last: float, share: float = 0.5, **options: Any) -> Variant:
    """A damping that falls, and gradients that keep their length."""
    return Variant({"damping": (first, last, share), **options}, SameLength)


VARIANTS = {
    "no AP": Variant(None),
    "base": Variant(),
    "damping 0.1": Variant({"damping": 0.1}),
    "damping 10": Variant({"damping": 10.0}),
    "power 1/2": Variant({"power": 0.5}),
    "power 1/2, damping 0.1": Variant({"power": 0.5, "damping": 0.1}),
    "power 1/4, damping 0.1": Variant({"power": 0.25, "damping": 0.1}),
    "sandwich": Variant({"form": "sandwich"}),
    "sandwich, damping 0.1": Variant({"form": "sandwich", "damping": 0.1}),
    "sandwich, condition and final": Variant(
        {"form": "sandwich", **without("^embed", "attention", "mlp")}
    ),
    "sandwich, condition, final and mlp.down": Variant(
        {"form": "sandwich", **without("^embed", "attention", r"mlp\.up")}
    ),
    "mlp.down and final": Variant(
        without(*CONDITION, "^embed", r"^final_", "attention", r"mlp\.up")
    ),
    "cov_decay 0.5": Variant({"cov_decay": 0.5}),
    "cov_decay 0": Variant({"cov_decay": 0.0}),
    "refresh every 4": Variant({"refresh_every": 4}),
    "refresh every step": Variant({"refresh_every": 1}),
    "refresh every step, earlier batches": Variant({"refresh_every": 1}, EarlierBatches),
    "refresh every step, cov_decay 0": Variant({"refresh_every": 1, "cov_decay": 0.0}),
    "refresh every step, cov_decay 0, earlier batches": Variant(
        {"refresh_every": 1, "cov_decay": 0.0}, EarlierBatches
    ),
    "refresh every 64": Variant({"refresh_every": 64}),
    "all rows": Variant({"max_rows": "all"}),
    "fades out": Variant({}, FadesOut),
    "power 1/2, without condition, embed, final": Variant(
        {"power": 0.5, **without(*CONDITION, r"embed", r"^final")}
    ),
    "same length": Variant({}, SameLength),
    "without condition, same length": Variant(without(*CONDITION), SameLength),
    "damping from 100 to 1, without condition, same length": same_length(
        100, 1, **without(*CONDITION)
    ),
    "damping from 10 to 1, same length": same_length(10, 1),
    "damping from 10 to 1, without condition, same length": same_length(
        10, 1, **without(*CONDITION)
    ),
    "damping from 10 to 1 in a tenth, same length": same_length(10, 1, 0.1),
    "damping from 10 to 1, power 1/2, same length": same_length(10, 1, power=0.5),
    "damping from 10 to 0.1, same length": same_length(10, 0.1),
    "damping from 10 to 0.1, power 1/2, same length": same_length(10, 0.1, power=0.5),
    "damping from 10 to 1, growing": growing(10, 1),
    "no AP, growing": Variant({"damping": (10.0, 1.0, 0.5)}, GrowingAlone),
    "damping from 10 to 1 in a tenth, growing": growing(10, 1, 0.1),
    "damping from 10 to 1 over the run, growing": growing(10, 1, 1.0),
    "damping from 100 to 1, growing": growing(100, 1),
    "damping from 100 to 1, without condition, growing": growing(100, 1, **without(*CONDITION)),
    "damping from 10 to 0.1, growing": growing(10, 0.1),
    "damping from 10 to 1, power 1/2, growing": growing(10, 1, power=0.5),
    "damping from 10 to 1, without condition, growing": growing(10, 1, **without(*CONDITION)),
    "damping from 10 to 1, fades out, growing": Variant(
        {"damping": (10.0, 1.0, 0.5)}, FadesOutLate
    ),
    **{
        f"damping from {first} to {last}{which}": Variant(
            {"damping": (first, last, 0.5), **(without(*CONDITION) if which else {})}
        )
        for first, last in ((10, 1), (100, 1), (100, 0.3), (100, 0.1))
        for which in ("", ", without condition")
    },
    "without condition": Variant(without(*CONDITION)),
    "without condition, embed, final": Variant(without(*CONDITION, r"embed", r"^final")),
    "without attention": Variant(without("attention")),
    "without mlp": Variant(without("mlp")),
    "without mlp.down": Variant(without(r"mlp\.down")),
    "mlp alone": Variant(without(*CONDITION, "embed", "final", "attention")),
    "attention alone": Variant(without(*CONDITION, "embed", "final", "mlp")),
    "condition alone": Variant(without("^embed", "^final$", "attention", "mlp")),
    "convolutions alone": Variant(without(*CONDITION, "attention")),
    "without convolutions": Variant(without(r"conv", r"\.op$", "^stem", "^head", "skip")),
    "full convolutions": Variant({"conv_mode": "full"}),
    "damping from 100 to 1, without condition, full convolutions": Variant(
        {"damping": (100.0, 1.0, 0.5), **without(*CONDITION), "conv_mode": "full"}
    ),
    "damping from 10 to 1, without condition, full convolutions, same length": same_length(
        10, 1, **without(*CONDITION), conv_mode="full"
    ),
    "sua convolutions": Variant({"conv_mode": "sua"}),
    "after momentum": Variant({}, AfterMomentum),
    "moments by band of time": Variant({}, TimeBands),
    "moments at late times": Variant({}, times=TimeSampler("logit_normal", mean=2.0)),
    "moments at early times": Variant({}, times=TimeSampler("logit_normal", mean=-2.0)),
}


@dataclass(frozen=True)
class Plan:
    """One run."""

    gp: str
    variant: str
    lr: float
    seed: int
    overrides: tuple[str, ...] = ()


def dopr_options(variant: Variant) -> dict[str, Any] | None:
    """The keyword arguments of the variant's DoPr; None for the optimizer alone."""
    return None if variant.options is None else BASE | dict(variant.options)


def train_and_evaluate(plan: Plan, config_path: Path, out: Path) -> dict[str, Any]:
    """Train and evaluate one run; its numbers are infinite if it diverged."""
    variant = VARIANTS[plan.variant]
    overrides = [
        *plan.overrides,
        f"name={name_of(plan)}",
        f"output={json.dumps(str(out))}",
        f"seed={plan.seed}",
        f"optimizer.name={plan.gp}",
        f"optimizer.lr={plan.lr!r}",
    ]
    if dopr_options(variant) is not None:
        overrides.append(f"optimizer.dopr={json.dumps(dopr_options(variant))}")
    config = load_config(config_path, overrides)
    with probing(variant):
        try:
            run = train(config, resume=True)
        except TrainingFailed:
            return {"plan": asdict(plan), "fd": math.inf, "one_step_loss": math.inf}
    card = json.loads(Evaluator(run).card().read_text())
    lines = [line for line in RunFolder.open(run).metrics() if "seconds_per_step" in line]
    seconds = sorted(line["seconds_per_step"] for line in lines)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # so that many runs fit on the disk
    return {
        "plan": asdict(plan),
        **{key: value for key, value in card["metrics"].items() if isinstance(value, float)},
        "by_time": card["metrics"]["one_step_loss_by_time"],
        "seconds_per_step": seconds[len(seconds) // 2],
    }


def name_of(plan: Plan) -> str:
    """Of the run's folder."""
    words = re.sub(r"[^a-z0-9.]+", "-", plan.variant.lower())
    return f"{plan.gp}-{words}-lr{plan.lr:g}-s{plan.seed}"


@contextmanager
def same_images() -> Iterator[None]:
    """Let all runs share the data set of the first, held in memory."""
    opened: dict[str, Datasets] = {}

    def build(config: Config) -> Datasets:
        key = config.data.model_dump_json()
        if key not in opened:
            found = build_datasets(config)
            parts = {"train": found.train, "held_out": found.held_out}
            files = {name: part for name, part in parts.items() if isinstance(part, ImageFiles)}
            held = {name: in_memory(part) for name, part in files.items()}
            opened[key] = replace(found, **held)
        return opened[key]

    with (
        patch("flowdopr.train.start.build_datasets", build),
        patch("flowdopr.evaluate.measure.build_datasets", build),
    ):
        yield


@contextmanager
def probing(variant: Variant) -> Iterator[None]:
    """Let training use the variant's DoPr and objective."""
    with ExitStack() as stack:
        stack.enter_context(patch("flowdopr.optim.build.DoPr", variant.dopr))
        times = variant.times
        if times is not None:

            def build(config: Config) -> MomentsAtOtherTimes:
                return MomentsAtOtherTimes(build_objective(config), times)

            stack.enter_context(patch("flowdopr.train.start.build_objective", build))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("config", type=Path, help="YAML file of a run")
    add("overrides", nargs="*", help="settings, section.key=value")
    add("--gp", default="muon", help="the optimizer")
    add("--lr", type=float, nargs="+", required=True, help="its learning rates")
    add("--variants", nargs="+", default=[*VARIANTS], choices=VARIANTS, metavar="VARIANT")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="of the runs")
    add("--out", type=Path, default=Path("ap-forms"), help="folder of the runs and runs.jsonl")
    options = parser.parse_intermixed_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "runs.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    done = {to_json(json.loads(line)["plan"]) for line in lines}
    plans = [
        Plan(options.gp, name, lr, seed, tuple(options.overrides))
        for seed in options.seeds
        for name in options.variants
        for lr in options.lr
    ]
    with same_images():
        for plan in (one for one in plans if to_json(asdict(one)) not in done):
            run = train_and_evaluate(plan, options.config, options.out)
            with results.open("a") as file:
                file.write(to_json(run, indent=None))
            print(f"{name_of(plan)}: loss {run['one_step_loss']:.5g}  FD {run['fd']:.4g}")


if __name__ == "__main__":
    main()
