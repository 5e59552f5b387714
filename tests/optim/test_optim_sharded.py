"""Every optimizer on two processes (gloo), by DDP and by FSDP2, takes the steps of one process."""

import pytest
import torch
from labels import LABELS, build
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_ranks import on_two_ranks

PROCESSES = 2
# K-FAC needs whole weights, and so do classes of other packages: see their tests of refusals.
WHOLE = ("kfac", "soap", "schedulefree", "pytorch_optimizer")
SHARDED = [name for name in LABELS if not any(word in name for word in WHOLE)]
CASES = [("ddp", name) for name in LABELS] + [("fsdp", name) for name in SHARDED]


def network(name: str) -> nn.Sequential:
    """For SOAP one whose gradients have full rank, as it takes any basis of what they leave out."""
    torch.manual_seed(0)
    if "soap" in name:
        return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4))
    model[2].fused_blocks = 3  # blocks of three rows, shards of five and four
    return model.double()


def train(kind: str, name: str, rank: int = 0) -> list[Tensor]:
    """The weights after five steps, of which every other one refreshes statistics."""
    model = network(name)
    parallel, share = model, slice(None)
    if kind == "ddp":
        parallel, share = DistributedDataParallel(model), slice(rank, None, PROCESSES)
    elif kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
        share = slice(rank, None, PROCESSES)
    statistics = name == "kfac" or name.startswith("dopr-")
    optimizer = build(model, name, 0.01, **({"refresh_every": 2} if statistics else {}))
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        parallel(x[share]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if kind == "fsdp" else p.detach() for p in model.parameters()]


def all_cases(rank: int) -> dict[tuple[str, str], list[Tensor]]:
    return {(kind, name): train(kind, name, rank) for kind, name in CASES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes has at the end; they are started once."""
    return on_two_ranks(all_cases, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_two_processes_take_the_steps_of_one(kind: str, name: str, ranks: list[dict]) -> None:
    expected = train("whole", name)
    for rank in ranks:
        for found, whole in zip(rank[kind, name], expected, strict=True):
            torch.testing.assert_close(found, whole, rtol=1e-7, atol=1e-9)
