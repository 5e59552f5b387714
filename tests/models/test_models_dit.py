"""DiT: sizes and outputs of SiT, and settings that are refused."""

import sys
from pathlib import Path

import pytest
import torch

from flowdopr.models import DiT

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from peers import SiT

LATENTS = (4, 32, 32)


def count(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("size", "depth", "hidden_size", "num_heads", "millions"),
    [
        ("S", 12, 384, 6, 33),
        ("B", 12, 768, 12, 130),
        ("L", 24, 1024, 16, 458),
        ("XL", 28, 1152, 16, 675),
    ],
)
def test_sizes_are_sits_without_the_discarded_head(size, depth, hidden_size, num_heads, millions):
    with torch.device("meta"):
        ours = DiT(LATENTS, 1000, size=size)
        theirs = SiT(LATENTS, 1000, depth=depth, hidden_size=hidden_size, num_heads=num_heads)
    discarded = (hidden_size + 1) * 2**2 * 4
    assert count(ours) == count(theirs) - discarded
    assert round(count(ours) / 1e6) == millions


def test_small_sizes():
    with torch.device("meta"):
        sizes = {size: count(DiT((1, 8, 8), 10, size=size)) for size in ("XXS", "XS", "T")}
    assert 200_000 < sizes["XXS"] < 500_000 < sizes["XS"] < 3_000_000 < sizes["T"] < 10_000_000


def test_options_change_the_function_and_parameters_as_said():
    tiny = {"depth": 1, "hidden_size": 48, "num_heads": 4}
    plain = count(DiT(LATENTS, **tiny))
    assert count(DiT(LATENTS, **tiny, rope=True)) == plain
    assert count(DiT(LATENTS, **tiny, norm="rms")) == plain
    assert count(DiT(LATENTS, **tiny, qk_norm=True)) == plain + 2 * 12
    biases = 2 * 128 - 192
    assert count(DiT(LATENTS, **tiny, mlp="swiglu")) == plain + biases


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "XXL"}, "model.size 'XXL' is unknown: choose one of XXS"),
        ({"patch_size": 3}, "model.patch_size 3 does not divide"),
        ({"size": "S", "num_heads": 5}, "num_heads 5"),
        ({"size": "S", "hidden_size": 90, "num_heads": 2}, "hidden_size 90"),
        ({"size": "S", "hidden_size": 12, "num_heads": 2, "rope": True}, "head width 6"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        DiT(LATENTS, **options)
    assert "\n" not in str(error.value)
