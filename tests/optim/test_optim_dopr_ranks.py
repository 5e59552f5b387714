"""Two processes (gloo) against one: the same Sigma, the same step, whatever ran where."""

import copy

import pytest
import torch
from layer_cases import small_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_ranks import on_two_ranks

from flowdopr.optim.dopr import DoPr, LayerRule

SETTINGS = {
    "ddp": {},
    "ddp-routed": {"rules": [LayerRule("spare", "diagonal"), LayerRule("")]},
    "ddp-bypassed": {"form": "sandwich"},
    "ddp-sua": {"conv_mode": "sua-mean"},
    "fsdp": {},
    "fsdp-sandwich": {"form": "sandwich"},
}


class Routed(nn.Module):
    """Has two layers fed one tensor, and a spare one for batches that start above zero.

    The spare one runs on some ranks and not on others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.main, self.spare = small_model().double(), nn.Linear(3, 3).double()
        self.left, self.right = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        y = self.left(y) * self.right(y)
        return y + self.spare(y) if x[0, 0, 0, 0] > 0 else y


class Pair(nn.Module):
    """Two layers that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.left, self.right = nn.Flatten(), nn.Linear(32, 3), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flat(x)
        return self.left(x) * self.right(x)


def samples(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64)


class Bypassed(Pair):
    """The weight of a third layer is used without calling it, so that it has no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(super().forward(x), self.third.weight, self.third.bias)


MODELS = {"ddp-routed": Routed, "ddp-bypassed": Bypassed}


def prepare(name: str, model: nn.Module, world: int) -> nn.Module:
    """The model as its ranks run it; shards in place where the name says so."""
    if world == 1:
        return model
    if name.startswith("ddp"):
        return DistributedDataParallel(model, find_unused_parameters=name == "ddp-routed")
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.children():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(name: str, rank: int, world: int) -> tuple[list[Tensor], dict]:
    """Five steps, each rank on its share of the batch; returns whole weights and the state."""
    torch.manual_seed(0)
    model = MODELS.get(name, small_model)().double()
    parallel = prepare(name, model, world)
    decay = 0.1 if name == "ddp-bypassed" else 0.0
    gp = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=decay, foreach=False)
    optimizer = DoPr(gp, model, refresh_every=2, max_rows="all", **SETTINGS[name])
    for step in range(5):
        optimizer.zero_grad()
        parallel(samples(step).chunk(world)[rank]).square().mean().backward()
        optimizer.step()
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [weight.detach() for weight in weights], optimizer.state_dict()["dopr"]


def sharded_roles() -> dict[str, str]:
    """Reasons by parameter name, of layers whose shards cut through the coordinates of z."""
    model = nn.Sequential(nn.Embedding(6, 4), nn.ConvTranspose2d(4, 4, 2), nn.Linear(4, 4))
    for layer in model:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    optimizer = DoPr(torch.optim.SGD(model.parameters()), model)
    return {name: reason for name, _, _, reason in optimizer.roles()}


def resumed(rank: int, saved_at: int) -> list[Tensor]:
    """Six steps of layers that share statistics, with a resume in between."""
    state: tuple | None = None
    model, optimizer = Pair().double(), None
    for part in (range(saved_at), range(saved_at, 6)):
        torch.manual_seed(0)
        model = Pair().double()
        optimizer = DoPr(torch.optim.SGD(model.parameters(), 0.1, 0.9), model, refresh_every=2)
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        parallel = DistributedDataParallel(model)
        for step in part:
            optimizer.zero_grad()
            parallel(samples(step).chunk(2)[rank]).square().mean().backward()
            optimizer.step()
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    return [p.detach() for p in model.parameters()]


class Parting(Pair):
    """Its second layer reads a copy of the tensor where the batch is marked."""

    def forward(self, x: Tensor) -> Tensor:
        marked = x[0, 0, 0, 0] > 100
        x = self.flat(x)
        return self.left(x) * self.right(x.clone() if marked else x)


def parted_at(rank: int) -> tuple[int, str]:
    """The step that raises, after the second rank alone reads two tensors at step 2."""
    model = Parting().double()
    parallel = DistributedDataParallel(model)
    optimizer = DoPr(torch.optim.SGD(model.parameters(), lr=0.1), model, refresh_every=2)
    for step in range(8):
        optimizer.zero_grad()
        x = samples(step).chunk(2)[rank].clone()
        x[0, 0, 0, 0] = 101 if step == 2 and rank == 1 else 0
        parallel(x).square().mean().backward()
        try:
            optimizer.step()
        except ValueError as error:
            return step, str(error)
    return -1, ""


def work(rank: int) -> dict:
    results: dict = {name: train(name, rank, 2) for name in SETTINGS}
    ends = [resumed(rank, step) for step in (0, 3, 4)]
    extra = {"roles": sharded_roles(), "resumed": ends, "parted": parted_at(rank)}
    return {**results, **extra}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two ranks has after every training; the processes are started once."""
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "ddp-routed"])
def test_two_ranks_equal_one(name: str, ranks: list[dict]) -> None:
    expected, state = train(name, 0, 1)
    for rank in ranks:
        weights, saved = rank[name]
        for a, b in zip(weights, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert saved["averages"].keys() == state["averages"].keys()
        for layer, entry in saved["averages"].items():
            torch.testing.assert_close(entry["sigma"], state["averages"][layer]["sigma"])


def test_a_layer_that_runs_on_one_rank_only_neither_hangs_nor_drifts(ranks: list[dict]) -> None:
    first, second = (rank["ddp-routed"][0] for rank in ranks)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert ranks[0]["ddp-routed"][1]["shared"] == {"right": "left"}


def test_a_change_of_shared_inputs_on_one_rank_stops_all_of_them(ranks: list[dict]) -> None:
    for rank in ranks:
        step, said = rank["parted"]
        assert step == 4
        assert "layer 'right' shares the statistics of layer 'left'" in said


def test_a_resume_is_bitwise(ranks: list[dict]) -> None:
    straight, *others = ranks[0]["resumed"]
    for weights in (*others, *ranks[1]["resumed"]):
        for a, b in zip(weights, straight, strict=True):
            assert torch.equal(a, b)


def test_shards_that_cut_through_z_are_left_to_the_gp_and_listed(ranks: list[dict]) -> None:
    roles = ranks[0]["roles"]
    assert "sharded along" in roles["0.weight"]
    assert "sharded along" in roles["1.weight"]
    assert roles["2.weight"] == "layer input"
