"""K-FAC on two processes (gloo, DDP): the steps of one process with the whole batch."""

import pytest
import torch
from layer_cases import small_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_ranks import on_two_ranks

from flowdopr.optim import build_optimizer
from flowdopr.optim.kfac import KFAC


class Routed(nn.Module):
    """A spare layer reads the samples whose first pixel is positive; an idle one reads none."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.spare, self.idle = small_model(), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        marked = x[:, 0, 0, 0] > 0
        y = self.main(x)
        if not marked.any():
            return y
        return y.index_add(0, marked.nonzero()[:, 0], self.spare(y[marked]))


def samples(step: int) -> Tensor:
    """Eight samples: at step 0 none is marked, at step 1 on the first rank, then on both."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64)
    x[:, 0, 0, 0] = -1
    x[: (0, 2, 6, 3, 8)[step], 0, 0, 0] = 1
    return x


def train(rank: int, world: int) -> tuple[list[Tensor], dict]:
    """Five steps with refreshes at 0, 2 and 4; two micro-batches a step."""
    torch.manual_seed(0)
    model = Routed().double()
    optimizer = KFAC(model, 0.05, refresh_every=2, weight_decay=0.1)
    parallel = DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    for step in range(5):
        optimizer.zero_grad()
        for micro_batch in samples(step).chunk(world)[rank].chunk(2):
            (parallel(micro_batch).square().mean() / 2).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()], optimizer.state_dict()["dopr"]["averages"]


def refusals_of_shards() -> list[str]:
    model = nn.Sequential(nn.Linear(4, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    said = []
    for name, dopr in (("kfac", None), ("soap", None), ("soap", {})):
        with pytest.raises(ValueError, match=f"(?i){name}") as error:
            build_optimizer(model, name, 0.1, dopr=dopr)
        said.append(str(error.value))
    return said


def work(rank: int) -> tuple:
    return (*train(rank, 2), refusals_of_shards())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


def test_two_ranks_take_the_steps_of_one(ranks: list[tuple]) -> None:
    expected, state = train(0, 1)
    for weights, saved, _ in ranks:
        for a, b in zip(weights, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert saved.keys() == state.keys()
        for key, entry in saved.items():  # the factors themselves, too: runs can change ranks
            torch.testing.assert_close(entry, state[key], rtol=1e-9, atol=1e-11)


def test_a_layer_that_no_rank_saw_stays_as_it_was(ranks: list[tuple]) -> None:
    torch.manual_seed(0)
    before = dict(Routed().double().named_parameters())
    names = list(before)
    for weights, _, _ in ranks:
        after = dict(zip(names, weights, strict=True))
        assert torch.equal(after["idle.weight"], before["idle.weight"])
        assert not torch.equal(after["spare.weight"], before["spare.weight"])


def test_shards_are_refused(ranks: list[tuple]) -> None:
    assert len(ranks[0][2]) == 3
    assert all("use DDP" in said for said in ranks[0][2])
