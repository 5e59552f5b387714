"""Why does activation preconditioning (AP) help one optimizer and not another? Measured on a run.

    python scripts/ap_mechanism.py CONFIG --out ap-mechanism [section.key=value ...]

Trains the config's run with checkpoints, and looks at each linear layer y = W z of the raw weights,
with the second moment Sigma of its inputs and the gradient G of the training loss:

    spectrum     eigenvalues of Sigma over their mean
    drift        distance of Sigma to that of an earlier checkpoint on the same images, noise and
                 times, |Sigma - Sigma'| / |Sigma| in Frobenius' norm
    noise        the same between two sets of images at one checkpoint
    efficiency   what a step in the direction D gains on other images, (G', D)^2 / (D, D Sigma'):
                 the decrease of a quadratic model of the loss, whose curvature is Sigma' for every
                 output, at its best step length. Given as a share of the best of all directions
                 here.

A second call draws the figure anew from mechanism.json.

G and Sigma make the direction on one half of the images, and G' and Sigma' judge it on the other.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from flowdopr.config import Config, load_config
from flowdopr.data import Datasets
from flowdopr.data.transforms import to_float
from flowdopr.disk import replacing, to_json
from flowdopr.flow import FlowMatching, build_objective
from flowdopr.latents import build_datasets
from flowdopr.models import build_model
from flowdopr.runs import RunFolder
from flowdopr.train import train

BATCH = 64
DAMPINGS = (0.1, 1.0)
KINDS = {
    "embed": "^embed",
    "condition": "condition|modulation",
    "attention.qkv": "qkv",
    "attention.proj": r"attention\.proj",
    "mlp.up": r"mlp\.up",
    "mlp.down": r"mlp\.down",
    "final": r"^final$",
}
"""Kinds of layers by regular expressions on their names."""


class Moments:
    """G of the mean loss, and Sigma, of every linear layer, on images that are given to `add`."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.model = model
        self.sums: dict[str, Tensor] = defaultdict(float)  # pyright: ignore
        self.rows: dict[str, int] = defaultdict(int)

    def measure(self, losses: list[Callable[[], Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> (G (out, in), Sigma (in, in)), means over the losses."""
        handles = [
            layer.register_forward_pre_hook(lambda _, args, name=name: self._take(name, args[0]))
            for name, layer in self.layers.items()
        ]
        self.model.zero_grad()
        for loss in losses:
            (loss() / len(losses)).backward()
        for handle in handles:
            handle.remove()
        return {
            name: (layer.weight.grad.clone(), self.sums[name] / self.rows[name])
            for name, layer in self.layers.items()
            if layer.weight.grad is not None
        }

    def _take(self, name: str, x: Tensor) -> None:
        z = x.detach().reshape(-1, x.shape[-1])
        self.sums[name] = self.sums[name] + z.T @ z
        self.rows[name] += len(z)


def unit(sigma: Tensor) -> Tensor:
    """Sigma over its mean eigenvalue."""
    return sigma / sigma.diagonal().mean()


def damped(sigma: Tensor, damping: float) -> Tensor:
    return unit(sigma) + damping * torch.eye(len(sigma))


def orthogonal(g: Tensor) -> Tensor:
    """Muon's direction, in its exact form."""
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    return u @ vh


def directions(g: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """Name -> D (out, in) of the optimizers without momentum; sign stands for Adam and Signum."""
    found = {"SGD": g, "sign": g.sign(), "Muon": orthogonal(g)}
    for damping in DAMPINGS:
        s = damped(sigma, damping)
        m = torch.linalg.solve(s, g, left=False)
        root = torch.linalg.inv(torch.linalg.cholesky(s)).T
        found |= {
            f"AP {damping:g}, SGD": m,
            f"AP {damping:g}, sign": m.sign(),
            f"AP {damping:g}, Muon": orthogonal(m),
            f"sandwich {damping:g}, Muon": orthogonal(g @ root) @ root.T,
        }
    return found


def efficiency(d: Tensor, g: Tensor, sigma: Tensor) -> float:
    """(G, D)^2 / (D, D Sigma), 0 for a step that raises the loss."""
    along = (g * d).sum().clamp_min(0)
    return float(along**2 / (d @ unit(sigma) * d).sum())


def kind_of(name: str) -> str | None:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), None)


def measure(config: Config, run: RunFolder, batches: int) -> dict[str, Any]:
    """By kind of layer, means over its layers but for the spectra.

    "spectrum": kind -> of each layer the eigenvalues over their mean, at the last checkpoint.
    "drift": kind -> one number for each checkpoint. "noise": kind -> number.
    "efficiency": step, as text -> kind -> direction -> share of the best.
    """
    datasets, objective = build_datasets(config), build_objective(config)
    model = build_model(config, datasets.info.image_shape, datasets.info.num_classes)
    model.train()
    images = torch.randperm(len(datasets.train), generator=torch.Generator().manual_seed(0))
    halves = images[: 2 * BATCH * batches].split(BATCH * batches)
    steps, moments = run.steps(), {}
    for step in steps:
        model.load_state_dict(run.load_weights(step, "raw"))
        moments[step] = [
            Moments(model).measure(losses(model, objective, datasets, half, seed))
            for seed, half in enumerate(halves)
        ]
    last = moments[steps[-1]][0]
    layers = {kind: [n for n in last if kind_of(n) == kind] for kind in KINDS}

    def mean(kind: str, of_layer: Callable[[str], Tensor | float]) -> Any:
        return torch.stack([torch.as_tensor(of_layer(n)) for n in layers[kind]]).mean(0).tolist()

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / a.norm())

    every = {
        str(step): {
            kind: shares([directions_on(first[n], second[n]) for n in layers[kind]])
            for kind in KINDS
        }
        for step, (first, second) in moments.items()
    }
    return {
        "steps": steps,
        "spectrum": {
            kind: [sorted_eigenvalues(last[n][1]).tolist() for n in layers[kind]] for kind in KINDS
        },
        "drift": {
            kind: [
                mean(kind, lambda n, s=s: distance(last[n][1], moments[s][0][n][1])) for s in steps
            ]
            for kind in KINDS
        },
        "noise": {
            kind: mean(kind, lambda n: distance(last[n][1], moments[steps[-1]][1][n][1]))
            for kind in KINDS
        },
        "efficiency": every,
    }


def losses(
    model: nn.Module, objective: FlowMatching, datasets: Datasets, images: Tensor, seed: int
) -> list[Callable[[], Tensor]]:
    """The training loss of each batch of `images`, always with the same noise and times."""
    shape = datasets.info.image_shape
    draw = objective.draw(len(images), shape, generator=torch.Generator().manual_seed(seed))

    def loss(part: slice) -> Tensor:
        x_1, y = datasets.train.batch(images[part])
        return objective(model, to_float(x_1), y, draw[part]).mean()

    parts = [slice(i, i + BATCH) for i in range(0, len(images), BATCH)]
    return [partial(loss, part) for part in parts]


def sorted_eigenvalues(sigma: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(unit(sigma).double()).flip(0).clamp_min(0)


def directions_on(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Direction -> its efficiency on the second half."""
    return {name: efficiency(d, *second) for name, d in directions(*first).items()}


def shares(of_layers: list[dict[str, float]]) -> dict[str, float]:
    """Direction -> mean over layers of its efficiency as a share of the layer's best."""
    best = [max(values.values()) for values in of_layers]
    return {
        name: sum(values[name] / top for values, top in zip(of_layers, best, strict=True))
        / len(of_layers)
        for name in of_layers[0]
    }


def draw(measured: dict[str, Any], path: Path) -> None:
    """Three panels: spectra, drift, and the efficiency of Muon and sign with AP and without."""
    figure, (spectra, drift, gain) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    steps = measured["steps"]
    for number, kind in enumerate(KINDS):
        color = f"C{number}"
        ranks = np.linspace(0, 1, 48)
        of_layers = [np.log(np.maximum(v, 1e-7)) for v in measured["spectrum"][kind]]
        values = np.exp(
            np.mean([np.interp(ranks, np.linspace(0, 1, len(v)), v) for v in of_layers], 0)
        )
        spectra.plot(ranks, values, color=color)
        lags = [steps[-1] - step for step in steps[:-1]]
        drift.plot(lags, measured["drift"][kind][:-1], color=color, label=kind)
        drift.axhline(measured["noise"][kind], color=color, linestyle=":", linewidth=0.8)
        ratio = [
            measured["efficiency"][str(step)][kind]["AP 1, Muon"]
            / measured["efficiency"][str(step)][kind]["Muon"]
            for step in steps
        ]
        gain.plot(steps, ratio, color=color)
        ratio = [
            measured["efficiency"][str(step)][kind]["AP 1, sign"]
            / measured["efficiency"][str(step)][kind]["sign"]
            for step in steps
        ]
        gain.plot(steps, ratio, color=color, linestyle="--")
    spectra.set(yscale="log", xlabel="rank / dimension", ylabel="eigenvalue / mean")
    spectra.set_title("Second moments of layer inputs")
    drift.legend(frameon=False, fontsize=8)
    drift.set(
        xscale="log", yscale="log", xlabel="steps before the last", ylabel="relative distance"
    )
    drift.set_title("Drift of the second moments (dotted: noise)")
    gain.axhline(1, color="grey", linewidth=0.8)
    gain.set(yscale="log", xlabel="step", ylabel="efficiency with AP / without")
    gain.set_title("AP before Muon (solid), before sign (dashed)")
    for axes in (spectra, drift, gain):
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as part:
        figure.savefig(part, dpi=110, format="png")


def table(measured: dict[str, Any]) -> str:
    """Shares of the best efficiency, means over the checkpoints, a Markdown table."""
    every = list(measured["efficiency"].values())
    lines = ["| direction | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for name in every[0]["embed"]:
        means = [sum(shares[kind][name] for shares in every) / len(every) for kind in KINDS]
        values = " | ".join(f"{mean:.2f}" for mean in means)
        lines.append(f"| {name} | {values} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("config", type=Path, help="YAML file of a run of a DiT")
    add("overrides", nargs="*", help="settings, section.key=value")
    add("--every", type=int, default=50, help="steps between checkpoints")
    add("--batches", type=int, default=32, help="batches of 64 images in each half")
    add("--out", type=Path, default=Path("ap-mechanism"), help="output folder")
    options = parser.parse_intermixed_args()
    out = options.out
    overrides = [*options.overrides, f"output={json.dumps(str(out))}"]
    config = load_config(
        options.config, [*overrides, f"train.checkpoint_every={options.every}", "name=run"]
    )
    file = out / "mechanism.json"
    if not file.exists():
        measured = measure(config, RunFolder.open(train(config, resume=True)), options.batches)
        with replacing(file) as part:
            part.write_text(to_json(measured))
    measured = json.loads(file.read_text())
    draw(measured, out / "mechanism.png")
    print(table(measured))


if __name__ == "__main__":
    main()
