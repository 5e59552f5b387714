"""What each optimisation of the code saves of DoPr's own time, by switching it off.

    python scripts/benchmark_tricks.py --threads 1 --json tricks.json

One arm uses every trick, and each other arm lacks one of them. Three parts of DoPr's work are
timed: gathering statistics in the forward pass, refreshing (averages, factorisations, inverses) and
applying the transforms. The arms take turns in windows of `refresh_every` steps with one refresh;
the figures are medians over windows, in milliseconds a step. The ratio of an arm's total to that of
the first arm is the extra cost of DoPr without the trick.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmark_optim import MODELS, REFRESH_EVERY, Arm, Setup, machine
from torch import Tensor

from flowdopr.disk import to_json
from flowdopr.optim.dopr import transforms

PARTS = ("gather", "refresh", "apply")


def whole_gram(sums: Tensor, rows: Tensor, weight: float = 1.0) -> None:
    """`add_second_moment` that computes both triangles of every symmetric matrix."""
    groups, blocks, side, _ = sums.shape
    stacked = rows.to(sums.dtype).reshape(-1, groups * blocks, side).transpose(0, 1)
    sums.view(-1, side, side).baddbmm_(stacked.mT, stacked, alpha=weight)


# By trick: the options of DoPr and the replaced functions that switch it off.
TRICKS: dict[str, tuple[dict[str, Any], dict[str, object]]] = {
    "all": ({}, {}),
    "no refresh interval": ({"refresh_every": 1}, {}),
    "no row subsampling": ({"max_rows": "all"}, {}),
    "no triangular Grams": ({}, {"flowdopr.optim.dopr.views.add_second_moment": whole_gram}),
    "no batched inverses": ({}, {"flowdopr.optim.dopr.transforms.MAX_INVERTED": 0}),
    "no batched application": ({}, {"flowdopr.optim.dopr.transforms.MAX_MULTIPLIED": 0}),
    "no oneDNN products": ({}, {"flowdopr.cpu.ONEDNN_MIN_PRODUCTS": math.inf}),
    "no shared statistics": (
        {},
        {"flowdopr.optim.dopr.statistics.Statistics._decide_sharing": lambda _: None},
    ),
    "no shared kernel offsets": ({"conv_mode": "full"}, {}),
}


class TrickArm:
    """A model trained with DoPr, with one trick switched off and DoPr's work timed by part."""

    def __init__(self, setup: Setup, trick: str) -> None:
        options, replaced = TRICKS[trick]
        self.arm = Arm(setup, "adamw", options)
        self.cuda = setup.device == "cuda"
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        dopr: Any = self.arm.optimizer
        dopr.statistics.gather_input = self._timed("gather", dopr.statistics.gather_input)
        dopr._refresh = self._timed("refresh", dopr._refresh)
        timed_apply = self._timed("apply", transforms.apply)
        self.replaced = {"flowdopr.optim.dopr.dopr.apply": timed_apply, **replaced}

    def window(self) -> dict[str, float]:
        """Milliseconds a step for each part, averaged over one window."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        with self._without_trick():
            for _ in range(REFRESH_EVERY):
                self.arm.step()
        parts = {part: 1e3 * value / REFRESH_EVERY for part, value in self.seconds.items()}
        return {**parts, "total": sum(parts.values())}

    @contextmanager
    def _without_trick(self) -> Iterator[None]:
        patches = [mock.patch(target, value) for target, value in self.replaced.items()]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = self._now()
            result = function(*args)
            self.seconds[part] += self._now() - start
            return result

        return timed

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(setup: Setup, windows: int) -> dict[str, dict[str, float]]:
    """Median milliseconds a step by trick and part, without the first window, a warm-up."""
    arms = {trick: TrickArm(setup, trick) for trick in TRICKS}
    windows_of: dict[str, list[dict[str, float]]] = {trick: [] for trick in TRICKS}
    for _ in range(windows + 1):
        for trick, arm in arms.items():
            windows_of[trick].append(arm.window())
    return {
        trick: {part: statistics.median(w[part] for w in rows[1:]) for part in (*PARTS, "total")}
        for trick, rows in windows_of.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["dit-xs/2", "unet-32"])
    parser.add_argument("--batch-size", type=int, default=64)
    windows_help = f"timed windows of {REFRESH_EVERY} steps"
    parser.add_argument("--windows", type=int, default=3, help=windows_help)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="smoke test: tiny models, one window")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = ["dit-xxs-quick", "unet-quick"] if options.quick else options.models
    batch, windows = (8, 1) if options.quick else (options.batch_size, options.windows)
    results = {}
    for model in models:
        rows = results[model] = measure(Setup(model, batch, options.device, False), windows)
        print(f"{model} batch {batch}, ms a step: gather + refresh + apply = total")
        for trick, row in rows.items():
            parts = " + ".join(f"{row[part]:7.2f}" for part in PARTS)
            ratio = row["total"] / rows["all"]["total"]
            print(f"  {trick:26s} {parts} = {row['total']:7.2f}  x{ratio:.2f}", flush=True)
    report = {"machine": machine(options.device), "batch_size": batch, "results": results}
    print(json.dumps(report["machine"]))
    if options.json:
        options.json.write_text(to_json(report))


if __name__ == "__main__":
    main()
