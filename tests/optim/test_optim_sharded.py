"""Two processes with FSDP2 shards take the steps of one process with the whole model."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from two_ranks import on_two_ranks

from flowdopr.optim import build_optimizer

NAMES = ("muon", "adamuon", "rownorm", "signum")


def trained(name, mesh=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 9), nn.Linear(9, 4))
    model[2].fused_blocks = 3  # blocks of three rows, shards of five and four
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model, name, 0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 5, generator=generator)).square().mean().backward()
        optimizer.step()
    return [(p if mesh is None else p.full_tensor()).detach() for p in model.parameters()]


def sharded_and_whole(rank):
    mesh = init_device_mesh("cpu", (2,))
    return {name: (trained(name, mesh), trained(name)) for name in NAMES}


def test_shards_take_the_steps_of_the_whole(tmp_path):
    for results in on_two_ranks(sharded_and_whole, tmp_path):
        for parts, weights in results.values():
            for sharded, whole in zip(parts, weights, strict=True):
                torch.testing.assert_close(sharded, whole, rtol=1e-5, atol=1e-6)
