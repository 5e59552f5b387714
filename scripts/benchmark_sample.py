"""Sampling speed beside a bare hand-written Euler loop on the same model, interleaved.

    python scripts/benchmark_sample.py [--quick] [--json FILE] [--threads N]

Both make the same images from the same noise, and the script checks that they agree. Ours is
`flowdopr.flow.generate`: noise by image, calls counted, torchdiffeq's Euler. A ratio is the median
over rounds of the loop's seconds / ours: above 1 we are faster.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from flowdopr.flow import generate, image_generator
from flowdopr.models import DiT, UNet

# In one batch; small models take more, so that a round is long enough to be timed.
IMAGES = {"dit-xxs": 512, "dit-s": 16, "unet": 16}


def initial_noise(number: int, shape: tuple[int, int, int]) -> Tensor:
    """The noise that `generate` gives images 0 to number - 1 under seed 0: (N, C, H, W)."""
    return torch.stack([torch.randn(shape, generator=image_generator(0, i)) for i in range(number)])


@torch.no_grad()
def bare_loop(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Euler's method in five lines; x (N, C, H, W) noise, y (N,)."""
    for i in range(steps):
        t = torch.full((len(x),), i / steps)
        x = x + model(x, t, y) / steps
    return x


def models() -> dict[str, nn.Module]:
    """A small and a large DiT and a U-Net, away from their zero initialisation."""
    made = {
        "dit-xxs": DiT((1, 8, 8), 10, size="XXS"),
        "dit-s": DiT((4, 32, 32), 1000, size="S"),
        "unet": UNet((3, 32, 32), 10, channels=64, channel_multipliers=(1, 2, 2)),
    }
    for model in made.values():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
    return {name: model.eval() for name, model in made.items()}


def timed(make: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    images = make()
    return images, time.perf_counter() - start


def measure(model: nn.Module, number: int, steps: int, rounds: int) -> dict[str, float]:
    """Interleave both samplers; the first round warms up and checks that they agree."""
    y = torch.arange(number) % model.num_classes

    def ours() -> Tensor:
        return generate(model, y, seed=0, solver="euler", steps=steps, batch_size=number).images

    def bare() -> Tensor:
        return bare_loop(model, initial_noise(number, model.image_shape), y, steps)

    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    torch.testing.assert_close(ours(), bare(), rtol=1e-4, atol=1e-4)
    for i in range(rounds):
        # Each goes first in every other round, so that neither profits from the order.
        pair = [("ours", ours), ("bare", bare)]
        for name, make in pair if i % 2 else pair[::-1]:
            seconds[name].append(timed(make)[1])
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["bare"], strict=True)]
    return {
        "images": number,
        "steps": steps,
        "rounds": rounds,
        "images_per_second": number / statistics.median(seconds["ours"]),
        "images_per_second_bare": number / statistics.median(seconds["bare"]),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds of few images")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    steps, rounds = (4, 5) if arguments.quick else (10, 9)
    report: dict[str, object] = {
        "environment": {
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }
    }
    for name, model in models().items():
        images = IMAGES[name] // 4 if arguments.quick else IMAGES[name]
        result = report[name] = measure(model, images, steps, rounds)
        print(
            f"{name}: {result['images_per_second']:.2f} images/s, bare loop "
            f"{result['images_per_second_bare']:.2f}, ratio {result['ratio']:.3f} "
            f"({result['ratio_low']:.3f} to {result['ratio_high']:.3f})",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
