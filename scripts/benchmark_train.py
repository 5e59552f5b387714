"""Training speed compared with SiT and torchcfm, in images a second for whole training steps.

    python scripts/benchmark_train.py [--quick] [--compile] [--json FILE] [--threads N]

Two pairs are timed in float32, our default settings against the other project's recipe:

- `dit`: our DiT-S/2 on 4 x 32 x 32 latents against SiT-S/2 (rebuilt from timm's parts), AdamW, EMA.
- `unet`: our U-Net with torchcfm's CIFAR-10 settings against torchcfm's own class, Adam, clipping,
  EMA. It needs `pip install --no-deps torchcfm`; without it the script skips the pair and says so.
  Before the timing, our U-Net is given torchcfm's weights and must give the same outputs.

`step` is the time of a whole step: noise and times, forward, backward, clipping, optimizer, EMA.
`model` is the time until the end of the backward pass. The two sides take turns. A ratio is the
median over rounds of their seconds divided by ours; above 1 we are faster.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peers import TORCHCFM_CIFAR10, SiT, load_torchcfm, torchcfm_unet
from torch import Tensor, nn

from flowdopr.disk import to_json
from flowdopr.flow import FlowMatching
from flowdopr.models import DiT, UNet
from flowdopr.optim import build_optimizer
from flowdopr.runs.averages import Average
from flowdopr.train.ema import EMA

# One training step, a generator that yields once after the backward pass so that it can be timed.
Step = Callable[[], Iterator[None]]


def our_step(
    model: nn.Module, x_1: Tensor, y: Tensor | None, *, max_norm: float | None, compiled: bool
) -> Step:
    """A training step as in `flowdopr.train`."""
    objective = FlowMatching(class_dropout_prob=0.0 if y is None else 0.1)
    optimizer = build_optimizer(model, "adamw", lr=1e-4)
    ema = EMA(model, [Average(decay=0.9999)])
    generator = torch.Generator().manual_seed(0)
    if compiled:
        model.compile()

    def step() -> Iterator[None]:
        draw = objective.draw(len(x_1), x_1.shape[1:], generator=generator, device=x_1.device)
        objective(model, x_1, y, draw).mean().backward()
        yield
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(1)

    return step


def sit_step(model: nn.Module, x_1: Tensor, y: Tensor) -> Step:
    """A training step as in SiT's script: AdamW, and an EMA with a loop over parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}

    def step() -> Iterator[None]:
        x_0, t = torch.randn_like(x_1), torch.rand(len(x_1))
        time_ = t[:, None, None, None]
        x_t, target = time_ * x_1 + (1 - time_) * x_0, x_1 - x_0
        labels = torch.where(torch.rand(len(y)) < 0.1, model.label.num_embeddings - 1, y)
        loss = (model(x_t, t, labels) - target).square().mean(dim=(1, 2, 3)).mean()
        optimizer.zero_grad()
        loss.backward()
        yield
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name].mul_(0.9999).add_(p, alpha=1e-4)

    return step


def torchcfm_step(model: nn.Module, x_1: Tensor) -> Step:
    """A training step as in torchcfm's CIFAR-10 script: Adam, clipping, EMA of the state dict."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    average = {name: value.clone() for name, value in model.state_dict().items()}

    def step() -> Iterator[None]:
        optimizer.zero_grad()
        x_0, t = torch.randn_like(x_1), torch.rand(len(x_1))
        time_ = t[:, None, None, None]
        x_t, target = time_ * x_1 + (1 - time_) * x_0, x_1 - x_0
        loss = torch.mean((model(t, x_t) - target) ** 2)
        loss.backward()
        yield
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, value in model.state_dict().items():
            average[name].copy_(average[name] * 0.9999 + value * 1e-4)

    return step


def dit_pair(batch_size: int, compiled: bool) -> dict[str, Step]:
    """Steps of DiT-S/2 and SiT-S/2 on the same latents."""
    shape, classes = (4, 32, 32), 1000
    x_1, y = torch.randn(batch_size, *shape), torch.randint(classes, (batch_size,))
    theirs = SiT(shape, classes, depth=12, hidden_size=384, num_heads=6)
    ours = our_step(DiT(shape, classes, size="S"), x_1, y, max_norm=None, compiled=compiled)
    return {"ours": ours, "theirs": sit_step(theirs, x_1, y)}


def unet_pair(batch_size: int, compiled: bool) -> dict[str, Step]:
    """Steps of both U-Nets with torchcfm's CIFAR-10 settings, after a check that they are equal."""
    x_1 = torch.randn(batch_size, 3, 32, 32)
    theirs, ours = torchcfm_unet(), UNet((3, 32, 32), **TORCHCFM_CIFAR10)
    check_equal(ours, theirs)
    return {
        "ours": our_step(ours, x_1, None, max_norm=1.0, compiled=compiled),
        "theirs": torchcfm_step(theirs, x_1),
    }


@torch.no_grad()
def check_equal(ours: UNet, theirs: nn.Module) -> None:
    """Give both U-Nets the same random weights and compare their outputs.

    Raises:
        RuntimeError: if the outputs differ by more than rounding.
    """
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.03)
    load_torchcfm(ours, theirs)
    x, t = torch.randn(2, 3, 32, 32), torch.rand(2)
    expected, out = theirs.eval()(t, x), ours.eval()(x, t)
    error = float((out - expected).norm() / expected.norm())
    if error > 1e-4:
        raise RuntimeError(f"our U-Net differs from torchcfm's by {error:.2g} of its output")
    ours.train()
    theirs.train()


def time_step(step: Step) -> tuple[float, float]:
    """Seconds until the end of the backward pass, and of the whole step."""
    start = time.perf_counter()
    parts = step()
    next(parts)
    model = time.perf_counter() - start
    next(parts, None)
    return model, time.perf_counter() - start


def measure(pair: dict[str, Step], batch_size: int, rounds: int) -> dict[str, float]:
    """Time both sides in turn and summarise; the first round is a warm-up and is dropped."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in pair}
    for i in range(rounds + 1):
        # The order alternates, so that it favours neither.
        for name in sorted(pair, reverse=bool(i % 2)):
            seconds[name].append(time_step(pair[name]))
    result = {"batch_size": batch_size, "rounds": rounds}
    for part, index in {"model": 0, "step": 1}.items():
        ours = [s[index] for s in seconds["ours"][1:]]
        theirs = [s[index] for s in seconds["theirs"][1:]]
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        result |= {
            f"{part}_images_per_second": batch_size / statistics.median(ours),
            f"{part}_images_per_second_theirs": batch_size / statistics.median(theirs),
            f"{part}_ratio": statistics.median(ratios),
            f"{part}_ratio_low": min(ratios),
            f"{part}_ratio_high": max(ratios),
        }
    return result


def environment() -> dict[str, str | int]:
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    pairs = ["dit", "unet"]
    parser.add_argument(
        "--quick", action="store_true", help="smoke test: few rounds, small batches"
    )
    parser.add_argument("--compile", action="store_true", help="apply torch.compile to our model")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--pairs", nargs="+", choices=pairs, default=pairs, help="pairs to time")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    batch_size, rounds = (4, 3) if arguments.quick else (16, 9)
    report: dict[str, object] = {"environment": environment()}
    for name in arguments.pairs:
        try:
            pair = {"dit": dit_pair, "unet": unet_pair}[name](batch_size, arguments.compile)
        except ValueError as error:
            print(f"{name}: skipped: {error}")
            continue
        result = report[name] = measure(pair, batch_size, rounds)
        for part in ("model", "step"):
            print(
                f"{name} {part:5}: {result[f'{part}_images_per_second']:.2f} images/s, theirs "
                f"{result[f'{part}_images_per_second_theirs']:.2f}, ratio "
                f"{result[f'{part}_ratio']:.2f} ({result[f'{part}_ratio_low']:.2f} to "
                f"{result[f'{part}_ratio_high']:.2f})",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(to_json(report))


if __name__ == "__main__":
    main()
