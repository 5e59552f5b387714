"""A picture of the singular values of weights over training.

    python scripts/weight_spectra.py RUN [RUN ...] --out spectra.png [--layers REGEX [REGEX ...]]

Each run has a row, each pattern a column. A panel has a line for every checkpoint, light for early
and dark for late ones: the singular values of the matrices of all layers that the pattern finds,
each matrix divided by its largest one, as the median over matrices; solid for the weight in use,
f(W) of a PC layer, and dashed for the raw W where that differs. Convolutions are matrices
(C_out, C_in k k). The median and the smallest of these values in
the newest checkpoint are printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from flowdopr.disk import replacing
from flowdopr.patterns import finder
from flowdopr.runs import RunFolder

LAYERS = [r"mlp\.up$", r"mlp\.down$", r"attention\.proj$"]


def spectrum(weights: Mapping[str, Tensor], pattern: str) -> np.ndarray:
    """Singular values, largest first and 1, as the median over the matrices of all layers whose
    names the pattern finds.

    Raises:
        ValueError: it finds none.
    """
    found = [
        torch.linalg.svdvals(weight.flatten(1).double())
        for name, weight in weights.items()
        if name.endswith(".weight") and weight.ndim > 1 and finder(pattern)(name[: -len(".weight")])
    ]
    if not found:
        raise ValueError(f"--layers: '{pattern}' finds no weight matrix: correct or remove it")
    return np.median(np.stack([(s / s[0]).numpy() for s in found]), axis=0)


def spectra(run: RunFolder, patterns: list[str]) -> dict[str, dict[int, dict[str, np.ndarray]]]:
    """By pattern and step, the spectra of the "raw" weights and of those "in use"."""
    found: dict[str, dict[int, dict[str, np.ndarray]]] = {pattern: {} for pattern in patterns}
    for step in run.steps():
        in_use = run.load_model(step, "raw")[0].state_dict()
        raw = run.load_weights(step, "raw")
        for pattern in patterns:
            found[pattern][step] = {
                "raw": spectrum(raw, pattern),
                "in use": spectrum(in_use, pattern),
            }
    return found


def draw(runs: Mapping[str, Mapping], patterns: list[str], path: Path) -> None:
    """The picture: a row for each of `runs`, their names and `spectra`."""
    size = (1 + 3.2 * len(patterns), 0.8 + 2.1 * len(runs))
    figure, axes = plt.subplots(
        len(runs), len(patterns), sharex=True, sharey=True, squeeze=False, figsize=size
    )
    for row, (name, of_run) in zip(axes, runs.items(), strict=True):
        row[0].set_ylabel(name, fontsize=8)
        for panel, pattern in zip(row, patterns, strict=True):
            steps = list(of_run[pattern])
            for number, step in enumerate(steps):
                colour = plt.get_cmap("viridis_r")(0.1 + 0.9 * number / max(1, len(steps) - 1))
                of_step = of_run[pattern][step]
                place = np.linspace(0, 1, len(of_step["raw"]))
                panel.plot(place, of_step["in use"], color=colour, label=f"step {step}")
                if not np.allclose(of_step["in use"], of_step["raw"]):
                    panel.plot(place, of_step["raw"], color=colour, linestyle="--")
            panel.set_yscale("log")
            panel.set_ylim(3e-3, 1.5)
    for panel, pattern in zip(axes[0], patterns, strict=True):
        panel.set_title(pattern, fontsize=9)
    for panel in axes[-1]:
        panel.set_xlabel("singular value, by rank", fontsize=8)
    axes[0][-1].legend(fontsize=6)
    figure.tight_layout()
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("spectra.png"), help="the picture")
    parser.add_argument("--layers", nargs="+", default=LAYERS, help="patterns of layer names")
    arguments = parser.parse_args()
    runs = {path.name: spectra(RunFolder.open(path), arguments.layers) for path in arguments.runs}
    draw(runs, arguments.layers, arguments.out)
    for name, of_run in runs.items():
        for pattern, of_pattern in of_run.items():
            step, newest = max(of_pattern.items())
            numbers = (f"{which} {np.median(s):.3f} and {s[-1]:.3g}" for which, s in newest.items())
            print(f"{name}, {pattern}, step {step}, median and smallest: {', '.join(numbers)}")


if __name__ == "__main__":
    main()
