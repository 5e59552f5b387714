r"""Training speed compared with SiT and torchcfm, in images a second for whole training steps.

    python scripts/benchmark_train.py [--quick] [--threads N] [--json FILE]
    python scripts/benchmark_train.py --device cuda --dit B --batch-size 256 \
      --precision bf16 --compile

Our default settings are timed against the other project's recipe, in pairs:

- `dit`: our DiT on 4 x 32 x 32 latents, patches of 2, against SiT of the same size (rebuilt from
  timm's parts), AdamW, EMA.
- `unet`: our U-Net with torchcfm's CIFAR-10 settings against torchcfm's own class, Adam, clipping,
  EMA. It needs `pip install --no-deps torchcfm`; without it the script skips the pair and says so.
  Before the timing, our U-Net is given torchcfm's weights and must give the same outputs.
- `pc`: our DiT with PC layers against our DiT without; the ratio is below 1 by what they cost.
- `precision`: our DiT with `--precision` and `--compile` against our DiT in float32 without.

A step is noise and times, forward, backward, clipping, optimizer and EMA. The two sides take
turns, on a CPU step by step, on a GPU ten steps at a time, which are waited for. A ratio is the
median over rounds of their seconds divided by ours; above 1 we are faster. With `--threads 1` on
a CPU these are seconds of the processor, in which other programs have no part. `--precision` and
`--compile` change our side, as a config does; with `--both` they change the other side too. On a
GPU both sides may use TF32 in float32, as SiT's script does.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peers import TORCHCFM_CIFAR10, SiT, torchcfm_unet
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from flowdopr.disk import to_json
from flowdopr.flow import FlowMatching
from flowdopr.linalg import tf32_products
from flowdopr.models import DiT, UNet, add_pc_layers, pc_layers, update_spectral_norms
from flowdopr.models.foreign import as_ours
from flowdopr.optim import DeferredRead, build_optimizer
from flowdopr.runs.averages import Average
from flowdopr.train.ema import EMA

Step = Callable[[], None]
LATER = 1000  # a step after those in which PC layers take more power iterations

DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12)}
"""Depth, width and heads."""


@dataclass(frozen=True)
class Setup:
    """How one side trains."""

    device: str
    bf16: bool
    compiled: bool

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)


def our_step(
    model: nn.Module, x_1: Tensor, y: Tensor | None, setup: Setup, *, max_norm: float | None
) -> Step:
    """A training step as in `flowdopr.train`, which reads the gradient's norm before it steps."""
    objective = FlowMatching(class_dropout_prob=0.0 if y is None else 0.1)
    optimizer = build_optimizer(model, "adamw", lr=1e-4)
    ema = EMA(model, [Average(decay=0.9999)])
    generator = torch.Generator(setup.device).manual_seed(0)
    parameters, has_pc_layers = list(model.parameters()), bool(pc_layers(model))
    if setup.compiled:
        model.compile()

    def step() -> None:
        draw = objective.draw(len(x_1), x_1.shape[1:], generator=generator, device=x_1.device)
        with setup.autocast():
            loss = objective(model, x_1, y, draw).mean()
        loss.backward()
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        sent = DeferredRead(norm)
        if max_norm is not None:
            clip_grads_with_norm_(parameters, max_norm, norm)
        sent.read()
        with tf32_products(setup.bf16):
            optimizer.step()
        if has_pc_layers:
            update_spectral_norms(model, LATER)
        ema.update(1)
        optimizer.zero_grad()

    return step


def sit_step(model: nn.Module, x_1: Tensor, y: Tensor, setup: Setup) -> Step:
    """A training step as in SiT's script: AdamW, and an EMA with a loop over parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    if setup.compiled:
        model.compile()

    def step() -> None:
        x_0, t = torch.randn_like(x_1), torch.rand(len(x_1), device=x_1.device)
        time_ = t[:, None, None, None]
        x_t, target = time_ * x_1 + (1 - time_) * x_0, x_1 - x_0
        dropped = torch.rand(len(y), device=y.device) < 0.1
        null = model.y_embedder.embedding_table.num_embeddings - 1
        labels = torch.where(dropped, null, y)
        with setup.autocast():
            loss = (model(x_t, t, labels) - target).square().mean(dim=(1, 2, 3)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name].mul_(0.9999).add_(p, alpha=1e-4)

    return step


def torchcfm_step(model: nn.Module, x_1: Tensor, setup: Setup) -> Step:
    """A training step as in torchcfm's CIFAR-10 script: Adam, clipping, EMA of the state dict."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    if setup.compiled:
        model.compile()

    def step() -> None:
        optimizer.zero_grad()
        x_0, t = torch.randn_like(x_1), torch.rand(len(x_1), device=x_1.device)
        time_ = t[:, None, None, None]
        x_t, target = time_ * x_1 + (1 - time_) * x_0, x_1 - x_0
        with setup.autocast():
            loss = torch.mean((model(t, x_t) - target) ** 2)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, value in model.state_dict().items():
            average[name].copy_(average[name] * 0.9999 + value * 1e-4)

    return step


def latents(batch_size: int, device: str) -> tuple[Tensor, Tensor, tuple[int, int, int], int]:
    """Latents and labels, and the shape of one and the number of classes."""
    shape, classes = (4, 32, 32), 1000
    x_1 = torch.randn(batch_size, *shape, device=device)
    return x_1, torch.randint(classes, (batch_size,), device=device), shape, classes


def dit_pair(batch_size: int, size: str, ours: Setup, theirs: Setup) -> dict[str, Step]:
    """Steps of a DiT and a SiT of one size on the same latents."""
    x_1, y, shape, classes = latents(batch_size, ours.device)
    depth, hidden_size, num_heads = DIT_SIZES[size]
    sit = SiT(shape, classes, depth=depth, hidden_size=hidden_size, num_heads=num_heads)
    dit = DiT(shape, classes, size=size)
    return {
        "ours": our_step(dit.to(ours.device), x_1, y, ours, max_norm=None),
        "theirs": sit_step(sit.to(ours.device), x_1, y, theirs),
    }


def own_pair(
    batch_size: int, size: str, ours: Setup, theirs: Setup, *, pc: bool
) -> dict[str, Step]:
    """Steps of two of our DiTs on the same latents; `pc`: the first one has PC layers."""
    x_1, y, shape, classes = latents(batch_size, ours.device)
    dit, other = (DiT(shape, classes, size=size).to(ours.device) for _ in range(2))
    return {
        "ours": our_step(add_pc_layers(dit) if pc else dit, x_1, y, ours, max_norm=None),
        "theirs": our_step(other, x_1, y, theirs, max_norm=None),
    }


def unet_pair(batch_size: int, ours: Setup, theirs: Setup) -> dict[str, Step]:
    """Steps of both U-Nets with torchcfm's CIFAR-10 settings, after a check that they are equal."""
    x_1 = torch.randn(batch_size, 3, 32, 32, device=ours.device)
    their_model, our_model = torchcfm_unet(), UNet((3, 32, 32), **TORCHCFM_CIFAR10)
    check_equal(our_model, their_model)
    return {
        "ours": our_step(our_model.to(ours.device), x_1, None, ours, max_norm=1.0),
        "theirs": torchcfm_step(their_model.to(ours.device), x_1, theirs),
    }


@torch.no_grad()
def check_equal(ours: UNet, theirs: nn.Module) -> None:
    """Give both U-Nets the same random weights and compare their outputs.

    Raises:
        RuntimeError: if the outputs differ by more than rounding.
    """
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.03)
    ours.load_state_dict(as_ours({"ema_model": theirs.state_dict()}, ours))
    x, t = torch.randn(2, 3, 32, 32), torch.rand(2)
    expected, out = theirs.eval()(t, x), ours.eval()(x, t)
    error = float((out - expected).norm() / expected.norm())
    if error > 1e-4:
        raise RuntimeError(f"our U-Net differs from torchcfm's by {error:.2g} of its output")
    ours.train()
    theirs.train()


def seconds_per_step(step: Step, device: str, steps: int) -> float:
    """Mean over `steps` steps that follow each other without waiting."""
    alone = device == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if alone else time.perf_counter
    start = now()
    for _ in range(steps):
        step()
    if device != "cpu":
        torch.accelerator.synchronize()
    return (now() - start) / steps


def measure(
    pair: dict[str, Step], batch_size: int, rounds: int, device: str, steps: int
) -> dict[str, float]:
    """Time both sides in turn and summarise; the first round is a warm-up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in pair}
    for i in range(rounds + 1):
        # The order alternates, so that it favours neither.
        for name in sorted(pair, reverse=bool(i % 2)):
            seconds[name].append(seconds_per_step(pair[name], device, steps))
    ours, theirs = seconds["ours"][1:], seconds["theirs"][1:]
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {
        "batch_size": batch_size,
        "rounds": rounds,
        "images_per_second": batch_size / statistics.median(ours),
        "images_per_second_theirs": batch_size / statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def environment(device: str) -> dict[str, str | int]:
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, pairs = parser.add_argument, ["dit", "unet", "pc", "precision"]
    add("--quick", action="store_true", help="smoke test: few rounds, small batches")
    add("--device", default="cpu", help="cpu or cuda")
    add("--dit", choices=DIT_SIZES, default="S", help="size of the DiT")
    add("--batch-size", type=int, default=16, help="images of a step")
    add("--precision", choices=["float32", "bf16"], default="float32", help="of our model")
    add("--compile", action="store_true", help="apply torch.compile to our model")
    add("--both", action="store_true", help="--precision and --compile for their model as well")
    add("--rounds", type=int, default=9, help="rounds that are timed")
    add("--json", type=Path, help="write the figures to this file")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--pairs", nargs="+", choices=pairs, default=pairs, help="pairs to time")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = arguments.device
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    batch_size, rounds = (4, 3) if arguments.quick else (arguments.batch_size, arguments.rounds)
    ours = Setup(device, arguments.precision == "bf16", arguments.compile)
    plain = Setup(device, bf16=False, compiled=False)
    theirs = ours if arguments.both else plain
    report: dict[str, object] = {"environment": environment(device)}
    for name in arguments.pairs:
        try:
            if name == "dit":
                pair = dit_pair(batch_size, arguments.dit, ours, theirs)
            elif name == "unet":
                pair = unet_pair(batch_size, ours, theirs)
            else:
                pc = name == "pc"
                pair = own_pair(batch_size, arguments.dit, ours, ours if pc else plain, pc=pc)
        except ValueError as error:
            print(f"{name}: skipped: {error}")
            continue
        steps = 1 if device == "cpu" else 10
        result = report[name] = measure(pair, batch_size, rounds, device, steps)
        print(
            f"{name}: {result['images_per_second']:.2f} images/s, theirs "
            f"{result['images_per_second_theirs']:.2f}, ratio {result['ratio']:.3f} "
            f"({result['ratio_low']:.3f} to {result['ratio_high']:.3f})",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(to_json(report))


if __name__ == "__main__":
    main()
