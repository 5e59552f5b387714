"""Golden losses: 20 steps of every optimizer on one small problem, so that a change of numbers is
seen and meant. `python tests/optim/test_optim_golden.py > tests/optim/golden_losses.json` records
new ones. In float64, where rounding, which differs between CPUs and layouts, is far below the
tolerance."""

import json
from pathlib import Path

import pytest
import torch
from labels import LABELS, OUTSIDE, build
from torch import nn

RECORDED = [label for label in LABELS if label.removeprefix("dopr-") not in OUTSIDE]
GOLDEN = Path(__file__).with_name("golden_losses.json")
LR = {"sgd": 0.05, "kfac": 0.01}


def network(name):
    """A small convolutional network; its matrices and convolutions are tall and wide.

    SOAP's matrix is square. Of another shape, the first gradient leaves directions without
    curvature, where SOAP's eigenbasis is whatever rounding makes it, and Adam's signs in it.
    """
    torch.manual_seed(0)
    channels, width = (1, 9) if "soap" in name else (2, 24)
    fused = nn.Linear(9 * channels, width)
    fused.fused_blocks = 3
    head = nn.AdaptiveAvgPool1d(3) if "soap" in name else nn.Linear(24, 3)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, channels, 3, stride=2),
        nn.Flatten(),
        fused,
        nn.Tanh(),
        head,
    ).double()


def losses(name, noise=0.0):
    """Losses at steps 1, 5, 10 and 20 of a small convolutional regression with uneven inputs.

    The initial weights are multiplied by 1 + `noise` times normal numbers.
    """
    model = network(name)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data *= 1 + noise * torch.randn(p.shape, dtype=p.dtype)
    lr = LR.get(name.removeprefix("dopr-"), 0.01)
    optimizer = build(model, name, lr, weight_decay=0.01)
    scales = torch.tensor([3, 1, 0.3, 0.1], dtype=torch.float64)[:, None, None]
    images = torch.randn(64, 4, 8, 8, generator=generator, dtype=torch.float64) * scales
    targets = torch.stack([images[:, 3].mean((1, 2)) * 10, images[:, 0, 4, 4], images[:, 1, 2, 2]])
    recorded = []
    for step in range(20):
        batch = torch.arange(16) + 16 * (step % 4)
        optimizer.zero_grad()
        loss = (model(images[batch]) - targets.T[batch]).square().mean()
        loss.backward()
        optimizer.step()
        if step in (0, 4, 9, 19):
            recorded.append(round(loss.item(), 9))
    return recorded


@pytest.mark.parametrize("name", RECORDED)
def test_losses_are_as_recorded(name):
    assert losses(name) == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=1e-5)


@pytest.mark.parametrize("name", RECORDED)
def test_rounding_does_not_move_the_losses(name):
    assert losses(name, noise=1e-12) == pytest.approx(losses(name), rel=1e-6)


if __name__ == "__main__":
    lines = [f'"{name}": {json.dumps(losses(name))}' for name in RECORDED]
    print("{\n  " + ",\n  ".join(lines) + "\n}")
