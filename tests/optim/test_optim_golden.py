"""Golden losses: 20 steps of every optimizer on one small problem, so that a change of numbers is
seen and meant. `python tests/optim/test_optim_golden.py` prints new ones."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from flowdopr.optim import OPTIMIZER_NAMES, build_optimizer

GOLDEN = Path(__file__).with_name("golden_losses.json")
LR = {"sgd": 0.05, "kfac": 0.01}


def losses(name):
    """Losses at steps 1, 5, 10 and 20 of a small convolutional regression with uneven inputs."""
    torch.manual_seed(0)
    fused = nn.Linear(18, 24)
    fused.fused_blocks = 3
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, 2, 3, stride=2),
        nn.Flatten(),
        fused,
        nn.Tanh(),
        nn.Linear(24, 3),
    )
    lr = LR.get(name.removeprefix("dopr-"), 0.01)
    optimizer = build_optimizer(model, name, lr, weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    images = (
        torch.randn(64, 4, 8, 8, generator=generator)
        * torch.tensor([3, 1, 0.3, 0.1])[:, None, None]
    )
    targets = torch.stack([images[:, 3].mean((1, 2)) * 10, images[:, 0, 4, 4], images[:, 1, 2, 2]])
    recorded = []
    for step in range(20):
        batch = torch.arange(16) + 16 * (step % 4)
        optimizer.zero_grad()
        loss = (model(images[batch]) - targets.T[batch]).square().mean()
        loss.backward()
        optimizer.step()
        if step in (0, 4, 9, 19):
            recorded.append(round(loss.item(), 6))
    return recorded


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_losses_are_as_recorded(name):
    assert losses(name) == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=2e-3)


if __name__ == "__main__":
    lines = [f'"{name}": {json.dumps(losses(name))}' for name in OPTIMIZER_NAMES]
    print("{\n  " + ",\n  ".join(lines) + "\n}")
