"""The folded convolution of enlarged images against the plain one: outputs and optimizer steps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flowdopr.models.resample import UpsampledConv2d
from flowdopr.optim import build_optimizer


class PlainUpsampling(nn.Module):
    """What the folded layer stands for, with its weights and names."""

    def __init__(self, folded: UpsampledConv2d):
        super().__init__()
        self.conv = nn.Conv2d(folded.in_channels, folded.out_channels, 3, padding=1).double()
        self.conv.load_state_dict(folded.state_dict())

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def pair(c_in: int = 3, c_out: int = 4) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    folded = nn.ModuleDict({"conv": UpsampledConv2d(c_in, c_out).double()})
    return folded, PlainUpsampling(folded["conv"])


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (1, 64), (7, 9), (3, 3), (1, 1)])
def test_is_the_convolution_of_the_enlarged_image(size):
    folded, plain = pair()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    results = []
    for module, image in ((folded["conv"], x.clone()), (plain, x.clone())):
        image.requires_grad_()
        out = module(image)
        out.sin().sum().backward()
        weight, bias = module.parameters()
        results.append((out, image.grad, weight.grad, bias.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", {"dopr": {"refresh_every": 2, "conv_mode": "full"}}),
        ("sgd", {"dopr": {"refresh_every": 2, "conv_mode": "sua"}}),
        ("sgd", {"dopr": {"refresh_every": 2, "conv_mode": "sua-mean"}}),
        ("adamw", {"dopr": {"refresh_every": 2, "form": "sandwich"}}),
        ("kfac", {"refresh_every": 2}),
    ],
)
def test_optimizers_see_the_enlarged_image(name, options):
    """Three steps on the folded layer are three steps on the plain one."""
    weights = []
    for model in pair():
        optimizer = build_optimizer(model, name, 0.05, **options)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            x = 1 + torch.randn(2, 3, 8, 9, dtype=torch.float64, generator=generator)
            optimizer.zero_grad()
            (model["conv"] if isinstance(model, nn.ModuleDict) else model)(
                x
            ).sin().mean().backward()
            optimizer.step()
        weights.append(dict(model.named_parameters()))
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key])
