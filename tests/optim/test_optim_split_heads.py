"""`split_heads`: attention's joint q, k, v takes the steps of one Linear a head.

Shapes: B batch, N tokens, D width, H heads, E = D / H head width.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flowdopr.optim import AdaMuon, Muon, build_optimizer
from flowdopr.optim.roles import format_roles, parameter_groups

D, H = 8, 2
E = D // H
SETTINGS = {"weight_decay": 0.1, "adjust_lr": "original"}


class Attention(nn.Module):
    """Self-attention (B, N, D) -> (B, N, D), with one joint projection or one for every head."""

    def __init__(self, *, joint):
        super().__init__()
        self.joint = nn.Linear(D, 3 * D, bias=False) if joint else None
        self.apart = nn.ModuleList(
            [] if joint else [nn.Linear(D, E, bias=False) for _ in range(3 * H)]
        )
        self.out = nn.Linear(D, D)
        if self.joint is not None:
            self.joint.fused_blocks, self.joint.heads = 3, H

    def forward(self, x):
        rows = self.joint(x) if self.joint is not None else [head(x) for head in self.apart]
        qkv = rows if self.joint is not None else torch.cat(rows, dim=-1)
        q, k, v = qkv.unflatten(-1, (3, H, E)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def projection(self):
        """The weights of q, k, v: (3 D, D), rows in the order (q/k/v, head, head width)."""
        return torch.cat([p.detach() for n, p in self.named_parameters() if "out" not in n])


def pair():
    torch.manual_seed(0)
    apart, joint = Attention(joint=False).double(), Attention(joint=True).double()
    joint.out.load_state_dict(apart.out.state_dict())
    joint.joint.weight.data = apart.projection()
    return joint, apart


def train(model, optimizer):
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(3, 6, D, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
    return model.projection()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("muon", SETTINGS),
        ("muon", {"nesterov": False}),
        ("adamuon", {"weight_decay": 0.1}),
        ("muon", {**SETTINGS, "dopr": {"refresh_every": 2}}),
        ("muon", {"dopr": {"form": "sandwich"}}),
    ],
)
def test_heads_of_a_joint_projection_follow_linears_of_their_own(name, options):
    joint, apart = pair()
    ours = train(joint, build_optimizer(joint, name, 0.02, split_heads=True, **options))
    theirs = train(apart, build_optimizer(apart, name, 0.02, **options))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    whole = pair()[0]
    unsplit = train(whole, build_optimizer(whole, name, 0.02, **options))
    assert (unsplit - theirs).abs().max() > 1e-4


@pytest.mark.parametrize("kdim", [None, 6])
def test_multihead_attention_needs_no_mark(kdim):
    model = nn.MultiheadAttention(D, H, kdim=kdim, vdim=kdim)
    groups = parameter_groups(model, "muon", weight_decay=0.0, adamw_for=(), split_heads=True)
    blocks = {id(p): group["fused_blocks"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        expected = {"in_proj_weight": 3 * H, "out_proj.weight": 1}
        expected |= {f"{part}_proj_weight": H for part in "qkv"}
        assert blocks[id(p)] == expected.get(name, 1)


def test_the_table_of_roles_counts_heads():
    model = pair()[0]
    assert "muon in 6 blocks" in format_roles(model, Muon(model, split_heads=True))
    assert "muon in 3 blocks" in format_roles(model, Muon(model))


def wrong_heads():
    model = nn.Sequential(nn.Linear(4, 6))
    model[0].heads = 4
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Muon(nn.Sequential(nn.Linear(4, 4)), split_heads=True), "no matrix of Sequential"),
        (lambda: AdaMuon(pair()[0], adamw_for=["joint"], split_heads=True), "has several heads"),
        (lambda: Muon([torch.ones(2, 2)], split_heads=True), "split_heads needs a model"),
        (lambda: Muon(wrong_heads(), split_heads=True), r"'0\.weight' has 6 rows.*heads=4"),
        (lambda: build_optimizer(pair()[0], "rownorm", 1.0, split_heads=True), "does not use"),
    ],
)
def test_refuses_what_it_cannot_split(make, message):
    with pytest.raises(ValueError, match=message):
        make()
