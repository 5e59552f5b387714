"""A run of two ranks with FSDP2 shards goes on as one process, by torch's own checkpoint calls."""

import copy
from typing import Any

import pytest
import torch
from layer_cases import small_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from two_ranks import on_two_ranks

from flowdopr.optim import build_optimizer
from flowdopr.optim.dopr import DoPr

WHOLE = StateDictOptions(full_state_dict=True)
NAMES = ("adamw", "muon")


def make(name: str, world: int) -> tuple[nn.Module, DoPr]:
    torch.manual_seed(0)
    model = small_model().double()
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.children():
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model, name, 0.01, dopr={"refresh_every": 2, "max_rows": "all"})
    assert isinstance(optimizer, DoPr)
    return model, optimizer


def train(model: nn.Module, optimizer: DoPr, steps: range, rank: int, world: int) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x.chunk(world)[rank]).square().mean().backward()
        optimizer.step()


def saved(model: nn.Module, optimizer: DoPr) -> dict[str, Any]:
    state = {
        "model": get_model_state_dict(model, options=WHOLE),
        "gp": get_optimizer_state_dict(model, optimizer.optimizer, options=WHOLE),
        "statistics": optimizer.statistics_state_dict(),
    }
    return copy.deepcopy(state)


def load(model: nn.Module, optimizer: DoPr, state: dict[str, Any]) -> None:
    set_model_state_dict(model, state["model"], options=WHOLE)
    set_optimizer_state_dict(model, optimizer.optimizer, state["gp"], options=WHOLE)
    optimizer.load_statistics_state_dict(state["statistics"])


def work(rank: int) -> dict[str, Any]:
    """Of each optimizer the state after three steps, and the weights after three more of a new
    model that was given it."""
    found = {}
    for name in NAMES:
        model, optimizer = make(name, 2)
        train(model, optimizer, range(3), rank, 2)
        state = saved(model, optimizer)
        model, optimizer = make(name, 2)
        load(model, optimizer, copy.deepcopy(state))  # torch shards in place what it loads
        train(model, optimizer, range(3, 6), rank, 2)
        found[name] = (state, get_model_state_dict(model, options=WHOLE))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_resume_and_go_on_as_one(name: str, ranks: list[dict]) -> None:
    straight, optimizer = make(name, 1)
    train(straight, optimizer, range(6), 0, 1)
    expected: dict[str, Tensor] = straight.state_dict()
    state, resumed = ranks[0][name]
    model, optimizer = make(name, 1)
    load(model, optimizer, state)
    assert optimizer.steps == 3
    train(model, optimizer, range(3, 6), 0, 1)
    for weights in (resumed, model.state_dict()):
        for key, weight in expected.items():
            torch.testing.assert_close(weights[key], weight, rtol=1e-9, atol=1e-11)


def test_torchs_call_on_dopr_itself_is_refused_with_the_cause() -> None:
    model, optimizer = make("adamw", 1)
    train(model, optimizer, range(1), 0, 1)
    state = get_optimizer_state_dict(model, optimizer)
    with pytest.raises(ValueError, match="distributed checkpoint, which keeps the GP's part alone"):
        set_optimizer_state_dict(model, optimizer, state)
