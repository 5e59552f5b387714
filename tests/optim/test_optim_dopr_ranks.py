"""Two processes (gloo) against one: the same Sigma, the same step, whatever ran where."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layer_cases import small_model
from torch import Tensor, nn

from flowdopr.optim.dopr import DoPr


def build(name: str) -> tuple[nn.Module, DoPr]:
    model = small_model().double()
    gp = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, DoPr(gp, model, refresh_every=2, max_rows=None)


def samples(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64)


def train(name: str, rank: int, world: int) -> list[Tensor]:
    """Four steps on a share of each batch, gradients averaged over ranks by hand or by DDP."""
    model, optimizer = build(name)
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    for step in range(4):
        optimizer.zero_grad()
        parallel(samples(step).chunk(world)[rank]).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def worker(rank: int, name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.save(train(name, rank, 2), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["plain"])
def test_two_ranks_equal_one(name: str, tmp_path: Path) -> None:
    mp.spawn(worker, (name, tmp_path), nprocs=2)
    expected = train(name, 0, 1)
    for rank in (0, 1):
        for a, b in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
