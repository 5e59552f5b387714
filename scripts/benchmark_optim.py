"""The cost of DoPr: step time and peak memory relative to the gradient preconditioner (GP) alone.

    python scripts/benchmark_optim.py --json benchmark.json

For each model and GP, three arms take turns step by step in one process: the GP alone, DoPr with
its default settings, and DoPr's exact mode (refresh at every step, from every row). A window of
`refresh_every` steps contains one refresh; a ratio is the median over windows of the arm's time
divided by the GP's. `--also` adds an arm of DoPr with other options. Peak memory is measured in a
separate process for each arm: on CUDA the peak of the allocator, on the CPU the growth of the
resident set after the imports.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flowdopr.disk import to_json
from flowdopr.linalg import tf32_products
from flowdopr.models import DiT, UNet
from flowdopr.optim import build_optimizer
from flowdopr.processes import peak_memory_mib

REFRESH_EVERY = 16
EXACT = {"refresh_every": 1, "max_rows": "all"}


@dataclass(frozen=True)
class Setup:
    """One model, its batch and where it runs."""

    model: str
    batch_size: int
    device: str
    autocast: bool


def small_unet(image_shape: tuple[int, int, int], channels: int, num_res_blocks: int = 2) -> UNet:
    """Three levels, attention at the lowest."""
    return UNet(
        image_shape,
        10,
        channels=channels,
        channel_multipliers=(1, 2, 2),
        num_res_blocks=num_res_blocks,
        attention_resolutions=(image_shape[1] // 4,),
    )


MODELS: dict[str, Callable[[], DiT | UNet]] = {
    "dit-xxs-quick": lambda: DiT((3, 8, 8), 10, size="XXS", patch_size=2),
    "unet-quick": lambda: small_unet((3, 8, 8), channels=8, num_res_blocks=1),
    "dit-xs/2": lambda: DiT((1, 28, 28), 10, size="XS", patch_size=2),
    "unet-32": lambda: small_unet((1, 28, 28), channels=32),
    "dit-s/4": lambda: DiT((3, 32, 32), 10, size="S", patch_size=4),
    "dit-b/2": lambda: DiT((3, 32, 32), 10, size="B", patch_size=2),
    "unet-64": lambda: UNet((3, 32, 32), 10, channels=64),
    "unet-128": lambda: UNet((3, 32, 32), 10, channels=128),
}
# The defaults are sizes that users train: MNIST on a CPU, CIFAR-10 on a GPU. "other" models are
# measured only if named by --models.
BATCH_SIZES = {
    "quick": {"dit-xxs-quick": 16, "unet-quick": 8},
    "cpu": {"dit-xs/2": 64, "unet-32": 64},
    "cuda": {"dit-b/2": 256, "unet-128": 128},
    "other": {"dit-s/4": 32, "unet-64": 16},
}


class Arm:
    """A model and its optimizer, trained by velocity regression on fixed random data."""

    def __init__(self, setup: Setup, gp: str, dopr: dict[str, Any] | None) -> None:
        torch.manual_seed(0)
        self.setup = setup
        self.model = MODELS[setup.model]().to(setup.device)
        if dopr is not None:
            dopr = {"refresh_every": REFRESH_EVERY} | dopr
        self.optimizer = build_optimizer(self.model, gp, 1e-4, dopr=dopr)
        images = (setup.batch_size, *self.model.image_shape)
        self.x_t, self.dx_t = (torch.randn(images, device=setup.device) for _ in range(2))
        self.t = torch.rand(setup.batch_size, device=setup.device)
        self.y = torch.randint(10, (setup.batch_size,), device=setup.device)

    def step(self) -> float:
        """Make one training step and return its seconds."""
        start = self._now()
        with torch.autocast(self.setup.device, torch.bfloat16, enabled=self.setup.autocast):
            velocity = self.model(self.x_t, self.t, self.y)
        loss = (velocity.float() - self.dx_t).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        with tf32_products(self.setup.autocast):  # as the trainer does
            self.optimizer.step()
        return self._now() - start

    def _now(self) -> float:
        if self.setup.device == "cuda":
            torch.cuda.synchronize()
        # On one thread the processor's seconds: other work on the machine does not count.
        alone = self.setup.device == "cpu" and torch.get_num_threads() == 1
        return time.process_time() if alone else time.perf_counter()


Arms = dict[str, tuple[str, dict[str, Any] | None]]


def arms_of(gp: str, also: dict[str, Any] | None = None) -> Arms:
    """The optimizer's name and the options of DoPr around it, by arm."""
    arms: Arms = {"gp": (gp, None), "dopr": (gp, {}), "dopr exact": (gp, EXACT)}
    return arms if also is None else {**arms, "dopr also": (gp, also)}


def time_steps(setup: Setup, recipes: Arms, windows: int) -> dict[str, list[float]]:
    """Seconds of each window of REFRESH_EVERY steps, by arm.

    The arms take turns step by step, with another one first in each step. The first window is a
    warm-up and is dropped.
    """
    arms = {arm: Arm(setup, *recipe) for arm, recipe in recipes.items()}
    seconds = {arm: [0.0] * (windows + 1) for arm in arms}
    order = list(arms)
    for step in range((windows + 1) * REFRESH_EVERY):
        order.append(order.pop(0))
        for arm in order:
            seconds[arm][step // REFRESH_EVERY] += arms[arm].step()
    return {arm: values[1:] for arm, values in seconds.items()}


def peak_memory(setup: Setup, gp: str, dopr: dict[str, Any] | None, steps: int) -> int:
    """Peak memory of `steps` steps in bytes; call it in a new process."""
    # One step of a tiny model loads the libraries, which are not counted.
    Arm(Setup("dit-xxs-quick", 2, setup.device, setup.autocast), "sgd", None).step()
    before = peak_memory_mib(torch.device("cpu"))
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    arm = Arm(setup, gp, dopr)
    for _ in range(steps):
        arm.step()
    if setup.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return round((peak_memory_mib(torch.device("cpu")) - before) * 2**20)


def measure(
    setup: Setup, gp: str, windows: int, also: dict[str, Any] | None = None
) -> dict[str, object]:
    """Times, memory and their ratios for one model and GP."""
    recipes = arms_of(gp, also)
    seconds = time_steps(setup, recipes, windows)
    memory = {}
    for arm, (name, options) in recipes.items():
        # Each arm gets a new process, because the peak of the resident set never falls.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory[arm] = pool.apply(peak_memory, (setup, name, options, 3))
    arms = {}
    for arm, values in seconds.items():
        ratios = [own / bare for own, bare in zip(values, seconds["gp"], strict=True)]
        arms[arm] = {
            "seconds_per_step": statistics.median(values) / REFRESH_EVERY,
            "time_ratio": statistics.median(ratios),
            "time_ratios": ratios,
            "memory_bytes": memory[arm],
            "memory_ratio": memory[arm] / memory["gp"],
        }
    return {**asdict(setup), "gp": gp, "windows": windows, "arms": arms}


def describe(result: dict) -> str:
    """The lines printed for one result."""
    lines = [f"{result['model']} batch {result['batch_size']} {result['device']} {result['gp']}"]
    for arm, row in result["arms"].items():
        lines.append(
            f"  {arm:11s} {row['seconds_per_step'] * 1e3:9.2f} ms/step"
            f"  time x{row['time_ratio']:.3f}"
            f"  peak {row['memory_bytes'] / 2**20:8.1f} MiB  memory x{row['memory_ratio']:.3f}"
        )
    return "\n".join(lines)


def machine(device: str) -> dict[str, str | int]:
    """Hardware and versions with which the figures were measured."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    processor = platform.processor() or platform.machine()
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of DoPr in time and memory.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gps", nargs="+", default=["adamw", "muon"], help="optimizers to wrap")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: depends on device")
    parser.add_argument("--batch-size", type=int, help="default: depends on model")
    parser.add_argument("--autocast", action="store_true", help="train under bfloat16 autocast")
    windows_help = f"timed windows of {REFRESH_EVERY} steps"
    parser.add_argument("--windows", type=int, default=7, help=windows_help)
    quick_help = "smoke test: tiny models, one window"
    parser.add_argument("--quick", action="store_true", help=quick_help)
    parser.add_argument("--also", type=json.loads, help="options of DoPr of one more arm, as JSON")
    parser.add_argument("--json", type=Path, help="write all ratios to this file")
    options = parser.parse_args()
    windows = 1 if options.quick else options.windows
    usual = {model: size for sizes in BATCH_SIZES.values() for model, size in sizes.items()}
    results = []
    for model in options.models or BATCH_SIZES["quick" if options.quick else options.device]:
        batch = options.batch_size or usual[model]
        for gp in options.gps:
            setup = Setup(model, batch, options.device, options.autocast)
            results.append(measure(setup, gp, windows, options.also))
            print(describe(results[-1]), flush=True)
    report = {"machine": machine(options.device), "results": results}
    print(json.dumps(report["machine"]))
    if options.json:
        options.json.write_text(to_json(report))
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
