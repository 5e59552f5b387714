"""Sampling speed compared with a hand-written Euler loop on the same model.

    python scripts/benchmark_sample.py [--quick] [--json FILE] [--threads N]

`flowdopr.flow.generate` with torchdiffeq's Euler method and the loop take turns. Both make the same
images from the same noise, and the script checks that they agree. A ratio is the median over rounds
of the loop's seconds divided by ours; above 1 we are faster.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from flowdopr.disk import to_json
from flowdopr.flow import generate, image_generator
from flowdopr.models import DiT, UNet

# Images in one batch; more for small models, so that a round is long enough to be timed.
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


def build_models() -> dict[str, nn.Module]:
    """A small DiT, a large DiT and a U-Net; all weights are random, so no output is zero."""
    models = {
        "dit-xxs": DiT((1, 8, 8), 10, size="XXS"),
        "dit-s": DiT((4, 32, 32), 1000, size="S"),
        "unet": UNet((3, 32, 32), 10, channels=64, channel_multipliers=(1, 2, 2)),
    }
    for model in models.values():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
    return {name: model.eval() for name, model in models.items()}


def seconds_of(sample: Callable[[], Tensor]) -> float:
    """Seconds of one call of `sample`."""
    start = time.perf_counter()
    sample()
    return time.perf_counter() - start


def measure(model: nn.Module, number: int, steps: int, rounds: int) -> dict[str, float]:
    """Time both samplers in turn, after a warm-up that checks that they agree."""
    y = torch.arange(number) % model.num_classes

    def ours() -> Tensor:
        return generate(model, y, seed=0, solver="euler", steps=steps, batch_size=number).images

    def bare() -> Tensor:
        return bare_loop(model, initial_noise(number, model.image_shape), y, steps)

    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    torch.testing.assert_close(ours(), bare(), rtol=1e-4, atol=1e-4)
    for i in range(rounds):
        # The order alternates, so that it favours neither.
        pair = [("ours", ours), ("bare", bare)]
        for name, sample in pair if i % 2 else pair[::-1]:
            seconds[name].append(seconds_of(sample))
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
    parser.add_argument("--quick", action="store_true", help="smoke test: few rounds, few images")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
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
    for name, model in build_models().items():
        images = IMAGES[name] // 4 if arguments.quick else IMAGES[name]
        result = report[name] = measure(model, images, steps, rounds)
        print(
            f"{name}: {result['images_per_second']:.2f} images/s, bare loop "
            f"{result['images_per_second_bare']:.2f}, ratio {result['ratio']:.3f} "
            f"({result['ratio_low']:.3f} to {result['ratio_high']:.3f})",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(to_json(report))


if __name__ == "__main__":
    main()
