"""Weights of other projects' models in ours: the outputs are theirs."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from flowdopr.models import DiT, UNet
from flowdopr.models.foreign import as_ours

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from peers import SiT, torchcfm_unet

needs_torchcfm = pytest.mark.skipif(
    find_spec("torchcfm") is None, reason="needs pip install --no-deps torchcfm"
)


def randomised(model: nn.Module) -> nn.Module:
    """The model with no layer left at zero, in float64, without dropout."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.double().eval()


def averaged(model: nn.Module) -> dict:
    """flow_matching's average of a model: a list of its parameters, beside other weights."""
    shadows = {f"shadow_params.{i}": value for i, value in enumerate(model.parameters())}
    others = {f"model.{name}": torch.zeros_like(v) for name, v in model.state_dict().items()}
    return others | {"num_updates": torch.tensor(3)} | shadows


@pytest.mark.parametrize(
    "stored",
    [
        lambda weights: weights,
        lambda weights: {f"module.{name}": value for name, value in weights.items()},
        lambda weights: {
            "model": {name: 0 * value for name, value in weights.items()},
            "ema": weights,
            "opt": {},
            "args": argparse.Namespace(model="SiT-S/4"),
        },
    ],
)
def test_a_sit_gives_the_same_outputs(stored):
    settings = {"depth": 2, "hidden_size": 48, "num_heads": 4, "patch_size": 4}
    sit, dit = randomised(SiT((3, 8, 8), 7, **settings)), DiT((3, 8, 8), 7, **settings).double()
    dit.load_state_dict(as_ours(stored(sit.state_dict()), dit))
    x, t = torch.randn(4, 3, 8, 8).double(), torch.rand(4).double()
    y = torch.tensor([0, 3, 6, 7])
    assert sit(x, t, y).std() > 0.1
    torch.testing.assert_close(dit(x, t, y), sit(x, t, y), rtol=1e-9, atol=1e-9)


@needs_torchcfm
@pytest.mark.parametrize(
    ("changes", "options", "stored"),
    [
        ({}, {"resample": "conv"}, lambda peer: {"ema_model": peer.state_dict()}),
        (
            {"resblock_updown": True, "use_scale_shift_norm": True, "class_cond": True},
            {"resample": "resblock", "scale_shift_norm": True, "num_classes": 5},
            lambda peer: {"net_model": peer.state_dict(), "step": 3},
        ),
        (
            {"use_new_attention_order": True},
            {},
            lambda peer: {"model": averaged(peer), "lr_schedule": {}},
        ),
        (
            {"learn_sigma": True, "num_head_channels": 128},
            {"head_channels": 128},
            nn.Module.state_dict,
        ),
    ],
)
def test_an_adm_unet_gives_the_same_outputs(changes, options, stored):
    sizes = {
        "dim": (3, 8, 8),
        "num_res_blocks": 1,
        "channel_mult": [1],
        "attention_resolutions": "8",
    }
    if options:
        sizes["channel_mult"] = [1, 1]
    peer = randomised(torchcfm_unet(**sizes, num_classes=5, **changes)).float()  # its time's dtype
    ours = UNet(
        (3, 8, 8),
        channels=128,
        channel_multipliers=sizes["channel_mult"],
        num_res_blocks=1,
        attention_resolutions=(8,),
        **{"scale_shift_norm": False, "head_channels": 64} | options,
    )
    ours.eval().load_state_dict(as_ours(stored(peer), ours))
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 4])
    expected = peer(t, x, *[y] * bool(ours.num_classes))[:, :3]
    assert expected.std() > 0.1
    assert (ours(x, t, y) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"rope": True}, {}, "model.norm=layer and model.rope=false"),
        ({"norm": "rms"}, {}, "model.norm=layer and model.rope=false"),
        ({}, {"pos_embed": torch.ones(1, 4, 48)}, "learned positions"),
        ({}, {"pos_embed": torch.ones(1, 5, 48)}, "learned positions"),
        ({}, {"shadow_params.0": torch.ones(2)}, r"averages \(shadow_params\) of 1 of 0 weights"),
    ],
)
def test_a_sit_is_refused_where_the_dit_computes_something_else(options, change, message):
    settings = {"depth": 1, "hidden_size": 48, "num_heads": 4, "patch_size": 4}
    weights = SiT((3, 8, 8), 7, **settings).state_dict() | change
    with pytest.raises(ValueError, match=message):
        as_ours(weights, DiT((3, 8, 8), 7, **settings, **options))


@pytest.mark.parametrize(
    ("channels", "message"),
    [(64, "group norms have 32 groups; ours have 16"), (128, "how its queries, keys and values")],
)
def test_an_adm_unet_is_refused_where_ours_computes_something_else(channels, message):
    weights = {"input_blocks.0.0.weight": torch.zeros(channels, 3, 3, 3)}
    weights |= {"middle_block.1.qkv.weight": torch.zeros(3 * channels, channels, 1)}
    model = UNet((3, 8, 8), channels=channels, channel_multipliers=(1,), attention_resolutions=())
    with pytest.raises(ValueError, match=message):
        as_ours(weights, model)
