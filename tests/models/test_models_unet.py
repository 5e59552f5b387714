"""U-Net: the peers' sizes, the identity of resampling, and settings that are refused."""

import pytest
import torch
import torch.nn.functional as F

from flowdopr.models import UNet
from flowdopr.models.layers import FusedLinear
from flowdopr.models.resample import Downsample, Upsample
from flowdopr.models.unet import AttentionBlock, ResBlock, group_norm

CIFAR10 = (3, 32, 32)


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        # torchcfm, examples/images/cifar10
        ({"head_channels": 64, "scale_shift_norm": False, "dropout": 0.1}, 35_746_307),
        # flow_matching, examples/image, cifar10
        (
            {
                "channel_multipliers": (2, 2, 2),
                "num_res_blocks": 4,
                "num_heads": 1,
                "resample": "pool",
                "dropout": 0.3,
            },
            55_676_419,
        ),
    ],
)
def test_parameter_counts_of_the_peers(options, parameters):
    with torch.device("meta"):
        assert count(UNet(CIFAR10, **options)) == parameters


def test_blocks_are_identities_at_the_start():
    x, c = torch.randn(2, 16, 4, 4), torch.randn(2, 8)
    block = ResBlock(16, 16, 8, dropout=0.0, scale_shift=True)
    assert torch.equal(block(x, c), x)
    assert torch.equal(AttentionBlock(16, 2)(x), x)


def test_resampling_blocks_carry_the_plain_image_at_the_start():
    x, c = torch.randn(2, 16, 4, 4), torch.randn(2, 8)
    up = ResBlock(16, 16, 8, dropout=0.0, scale_shift=True, resample="up")
    down = ResBlock(16, 16, 8, dropout=0.0, scale_shift=True, resample="down")
    assert torch.equal(up(x, c), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(down(x, c), F.avg_pool2d(x, 2))
    torch.testing.assert_close(down(up(x, c), c), x)


def test_residual_block_formula():
    block = ResBlock(16, 24, 8, dropout=0.0, scale_shift=True).double()
    torch.nn.init.normal_(block.conv_2.weight)
    x, c = torch.randn(2, 16, 4, 4).double(), torch.randn(2, 8).double()
    h = block.conv_1(F.silu(block.norm_1(x)))
    scale, shift = block.modulation(c)[:, :, None, None].split(24, dim=1)
    h = block.conv_2(F.silu(block.norm_2(h) * (1 + scale) + shift))
    torch.testing.assert_close(block(x, c), block.skip(x) + h)


def test_added_condition_is_not_fused():
    added = ResBlock(16, 16, 8, dropout=0.0, scale_shift=False).modulation
    film = ResBlock(16, 16, 8, dropout=0.0, scale_shift=True).modulation
    assert isinstance(added, FusedLinear)
    assert (added.fused_blocks, film.fused_blocks) == (1, 2)


def test_changes_of_resolution():
    x = torch.randn(1, 8, 6, 4)
    assert Upsample(8, conv=True)(x).shape == (1, 8, 12, 8)
    assert Downsample(8, conv=True)(x).shape == (1, 8, 3, 2)
    assert not list(Upsample(8, conv=False).parameters())
    assert not list(Downsample(8, conv=False).parameters())


@pytest.mark.parametrize(
    ("channels", "groups"), [(4, 1), (16, 4), (64, 16), (96, 8), (128, 32), (256, 32), (384, 32)]
)
def test_groups_keep_four_channels_or_more(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_dropout_acts_in_training_only():
    options = {"channels": 16, "channel_multipliers": (1,), "attention_resolutions": ()}
    model = UNet((1, 8, 8), dropout=0.5, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    assert not torch.equal(model(x, t), model(x, t))
    model.eval()
    assert torch.equal(model(x, t), model(x, t))


def test_feature_maps_are_channels_last_for_grey_images_too():
    model = UNet((1, 8, 8), channels=16, channel_multipliers=(1, 2), attention_resolutions=())
    layouts = []
    for module in model.modules():
        if isinstance(module, ResBlock):
            module.register_forward_hook(lambda _m, _i, out: layouts.append(out))
    model(torch.randn(2, 1, 8, 8), torch.rand(2))
    assert layouts
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in layouts)


def test_weights_and_gradients_are_channels_last():
    model = UNet((3, 8, 8), channels=16, channel_multipliers=(1, 2), attention_resolutions=())
    model(torch.randn(2, 3, 8, 8), torch.rand(2)).sum().backward()
    kernels = [p for p in model.parameters() if p.dim() == 4]
    assert len(kernels) > 10
    for kernel in kernels:
        assert kernel.is_contiguous(memory_format=torch.channels_last)
        assert kernel.grad.stride() == kernel.stride()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 30}, "model.channels 30"),
        ({"channel_multipliers": (1, 2, 2, 2, 2, 2, 2)}, "has 7 levels, but 32 x 32 images"),
        ({"channel_multipliers": ()}, "has 0 levels"),
        ({"attention_resolutions": (16, 14)}, "has 14, but the levels have heights 32, 16, 8, 4"),
        ({"head_channels": 100}, "model.head_channels 100 does not divide 256"),
        ({"num_heads": 3}, "num_heads 3"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message) as error:
        UNet(CIFAR10, **options)
    assert "\n" not in str(error.value)
