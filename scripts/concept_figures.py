"""The figures of docs/concepts.md, within a minute on one CPU core.

    python scripts/concept_figures.py docs

`rollout.png`: a flow from noise to two half circles. `activation-preconditioning.png`: a linear
layer whose inputs vary ten times as much in one direction as in the other.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn

from flowdopr.flow import FlowMatching, generate, trajectory
from flowdopr.optim import DoPr

NOISE, DATA, PLAIN, AP = "0.6", "tab:blue", "tab:orange", "tab:green"
ARROWS = {"angles": "xy", "scale_units": "xy", "width": 0.006, "zorder": 3}


class Velocity(nn.Module):
    """A network of points x (B, 2) and times t (B,)."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(3, 128), (128, 128), (128, 2)]
        first, second, last = (nn.Linear(*width) for width in widths)
        self.layers = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], 1))


def half_circles(number: int, seed: int) -> Tensor:
    """Points (number, 2) on two half circles, of mean 0."""
    points, _ = make_moons(number, noise=0.03, random_state=seed)
    return 2 * (torch.tensor(points, dtype=torch.float32) - torch.tensor([0.5, 0.25]))


def trained(steps: int = 3000) -> Velocity:
    """The velocity from noise to the half circles, as docs/thirty-lines.md trains one."""
    torch.manual_seed(0)
    model, objective = Velocity(), FlowMatching()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x_1 = half_circles(256, step)
        draw = objective.draw(len(x_1), (2,), generator=generator)
        loss = objective(model, x_1, None, draw).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return model


def draw_rollouts(path: Path) -> None:
    """What the network is trained on, what it is used for, and what comes out."""
    model, shape = trained(), {"image_shape": (2,), "seed": 0}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), sharex=True, sharey=True)
    data = half_circles(600, 1)
    for axis in axes:
        axis.plot(*data.T, ".", color=DATA, alpha=0.25, ms=3)
        axis.set(aspect="equal", xlim=(-3.6, 3.6), ylim=(-2.4, 2.4), xticks=[], yticks=[])

    torch.manual_seed(3)
    x_0, x_1, t = torch.randn(8, 2), half_circles(8, 2), torch.linspace(0.1, 0.8, 8)[:, None]
    x_t = (1 - t) * x_0 + t * x_1
    for start, end in zip(x_0, x_1, strict=True):
        axes[0].plot(*torch.stack([start, end]).T, color=NOISE, lw=0.7)
    axes[0].plot(*x_0.T, "o", color=NOISE, ms=4)
    axes[0].quiver(*x_t.T, *(x_1 - x_0).T, scale=3, color=PLAIN, **ARROWS)
    axes[0].set_title("training: one velocity at one time")

    drawn = trajectory(model, None, indices=range(30), frames=33, **shape).x_t  # (T, N, 2)
    for number in range(30):
        axes[1].plot(*drawn[:, number].T, color=PLAIN, lw=0.8)
    axes[1].plot(*drawn[0].T, "o", color=NOISE, ms=4)
    axes[1].plot(*drawn[-1].T, "o", color=PLAIN, ms=4)
    axes[1].set_title("use: rollouts follow their own predictions")

    points = generate(model, None, num_images=600, **shape).images
    axes[2].plot(*points.T, ".", color=PLAIN, ms=3)
    axes[2].set_title("their ends, compared with the data")
    save(figure, path)


def errors(optimizer_of, turn: Tensor, deviations: Tensor, steps: int) -> Tensor:
    """W - W* (steps + 1, 2) in the directions of the inputs, while a layer learns W* z.

    Args:
        turn: (2, 2), the directions of the inputs. deviations: (2,), theirs along them.
    """
    generator = torch.Generator().manual_seed(0)
    layer, wanted = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 1.0]]) @ turn.T
    nn.init.zeros_(layer.weight)
    optimizer, found = optimizer_of(layer), [(layer.weight - wanted) @ turn]
    for _ in range(steps):
        z = torch.randn(256, 2, generator=generator) * deviations @ turn.T
        loss = 0.5 * (layer(z) - z @ wanted.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append((layer.weight.detach() - wanted) @ turn)
    return torch.cat(found).detach()


def draw_preconditioning(path: Path) -> None:
    """The inputs, the way of the weights over the loss, and the errors along both directions."""
    angle = torch.tensor(0.6)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    deviations = torch.tensor([1.0, 0.1])

    def sgd(layer: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(layer.parameters(), lr=0.2)

    def with_ap(layer: nn.Module) -> torch.optim.Optimizer:
        return DoPr(sgd(layer), layer, damping=1e-3, refresh_every=1)

    ways = {"SGD": (sgd, PLAIN), "DoPr-SGD": (with_ap, AP)}
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    z = torch.randn(400, 2, generator=torch.Generator().manual_seed(1)) * deviations @ turn.T
    axes[0].plot(*z.T, ".", color=DATA, ms=3)
    axes[0].set(aspect="equal", title="inputs z of the layer", xlim=(-3, 3), ylim=(-3, 3))
    for name, (optimizer_of, color) in ways.items():
        found = errors(optimizer_of, turn, deviations, 150)
        axes[1].plot(*found.T, ".-", color=color, ms=4, lw=1, label=name)
        for direction, style in enumerate(("-", "--")):
            label = f"{name}, {('much', 'little')[direction]}"
            axes[2].semilogy(found[:, direction].abs(), style, color=color, label=label)
    grid = torch.linspace(-1.2, 1.2, 100)
    high, low = torch.meshgrid(grid, grid, indexing="xy")
    loss = 0.5 * ((high * deviations[0]) ** 2 + (low * deviations[1]) ** 2)
    axes[1].contour(grid, grid, loss.sqrt(), levels=12, colors=NOISE, linewidths=0.6)
    axes[1].set(
        title="error of the weights over the loss",
        xlabel="where inputs vary much",
        ylabel="where inputs vary little",
    )
    axes[2].set(title="error by direction", xlabel="step", ylim=(1e-4, 2))
    axes[1].legend()
    axes[2].legend(title="where inputs vary", loc="upper right", bbox_to_anchor=(1, 0.92))
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})  # the same bytes each time
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    draw_rollouts(folder / "rollout.png")
    draw_preconditioning(folder / "activation-preconditioning.png")
