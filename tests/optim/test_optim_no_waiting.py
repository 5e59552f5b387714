"""The host never waits for the device: training steps on fake CUDA tensors, which have no values.

To read a number of one raises an error by itself; what else makes a host wait is refused here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from layer_cases import CASES, IDS, LayerCase, small_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from flowdopr.models import add_pc_layers, update_spectral_norms
from flowdopr.models.layers import Linear
from flowdopr.optim import build_optimizer
from flowdopr.optim.dopr import DoPr, LayerRule
from flowdopr.optim.dopr.processes import own_share

# Before 2.11 even fake CUDA tensors ask for a driver.
pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.11", reason="fake CUDA tensors without a driver need torch 2.11"
)
aten = torch.ops.aten
UNCHECKED = {
    aten.linalg_cholesky_ex.default,
    aten.linalg_solve_triangular.default,
    aten.linalg_vector_norm.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class WaitError(Exception):
    """An operation for which the host would wait."""


class NoWaiting(TorchDispatchMode):
    """Refuses what waits; numbers that are on the host read as ones."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].device.type == "cpu":
            return 1.0 if args[0].dtype.is_floating_point else 1
        if "linalg_" in str(func) and (func not in UNCHECKED or kwargs.get("check_errors")):
            raise WaitError(func)
        if func in INDEXING:
            for index in args[1]:
                if index is not None and (index.dtype == torch.bool or index.device.type == "cpu"):
                    raise WaitError(f"{func} by a mask, or by numbers on the host")
        result = func(*args, **kwargs)
        if func in COPIES:
            source = args[1] if func is aten.copy_.default else args[0]
            # Only to a new tensor, which torch pins, does a copy not wait; and none from the host.
            arrives_later = func is aten._to_copy.default and kwargs.get("non_blocking")
            if source.device != result.device and not (
                arrives_later and source.device.type != "cpu"
            ):
                raise WaitError(f"{func} from {source.device} to {result.device}")
        return result


class Event:
    """Stands for a CUDA event, which needs a driver; what is read a refresh later has arrived."""

    def __init__(self, device: torch.device) -> None: ...

    def record(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...


@contextmanager
def cuda_without_waiting() -> Iterator[None]:
    events = mock.patch("torch.Event", Event)
    streams = mock.patch("torch.accelerator.current_stream")
    with FakeTensorMode(), torch.device("cuda"), NoWaiting(), events, streams:
        yield


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> None:
    """Forwards and steps; backward is left out, which CUDA's autograd engine has no device for."""
    for _ in range(steps):
        optimizer.zero_grad()
        for micro_batch in (x, x[1:]):
            model(micro_batch)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def waits(run) -> bool:
    try:
        with cuda_without_waiting():
            run()
    except (WaitError, DataDependentOutputException, DynamicOutputShapeException):
        return True
    return False


def test_waiting_is_noticed() -> None:
    assert waits(lambda: torch.ones(3).sum().item())
    assert waits(lambda: torch.ones(3).tolist())
    assert waits(lambda: torch.ones(3).cpu())
    assert waits(lambda: torch.tensor([1.0], device="cpu").to("cuda"))
    assert waits(lambda: torch.ones(3, device="cpu").to("cuda", non_blocking=True))
    assert waits(lambda: torch.ones(3, device="cpu").copy_(torch.ones(3), non_blocking=True))
    assert waits(lambda: torch.linalg.cholesky(torch.eye(3)))
    assert waits(lambda: torch.linalg.cholesky_ex(torch.eye(3), check_errors=True))
    assert waits(lambda: torch.linalg.svd(torch.eye(3)))
    assert waits(lambda: torch.ones(3)[torch.ones(3).bool()])
    assert waits(lambda: torch.ones(3)[torch.zeros(1, device="cpu").long()])
    assert waits(lambda: torch.ones(3).index_put_((torch.ones(3).bool(),), torch.ones(3)))
    assert not waits(lambda: torch.ones(3).to("cpu", non_blocking=True).tolist())


def modes_of(case: LayerCase) -> list[str]:
    """The modes that this kind of layer can have."""
    module = case.build()
    if isinstance(module, nn.Embedding):
        return ["diagonal"]
    shared = ["sua", "sua-mean"] if isinstance(module, nn.Conv2d) else []
    return ["full", "diagonal", *shared]


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("rows", [3, "all"])
def test_no_layer_makes_the_host_wait(case: LayerCase, rows: int | str) -> None:
    for mode in modes_of(case):
        with cuda_without_waiting():
            module, x = case.build(), torch.rand(case.shape)
            x = x.long() if isinstance(module, nn.Embedding) else x
            gp = torch.optim.SGD(module.parameters(), lr=0.1)
            rules = [LayerRule("", mode)]
            optimizer = DoPr(gp, module, rules=rules, refresh_every=2, max_rows=rows)
            train(module, optimizer, x, 3)
            assert optimizer.transforms[0] is not None


SETTINGS = {
    "defaults": {},
    "sandwich": {"form": "sandwich"},
    "schedule": {"damping": (1.0, 0.1, 3)},
    "sua-mean": {"conv_mode": "sua-mean"},
}


@pytest.mark.parametrize("gp", ["sgd", "adamw", "muon", "signum", "adamuon", "rownorm"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_no_optimizer_makes_the_host_wait(gp: str, settings: dict) -> None:
    with cuda_without_waiting():
        model = nn.Sequential(small_model(), nn.LayerNorm(3))
        optimizer = build_optimizer(model, gp, 1e-3, dopr={"refresh_every": 2, **settings})
        train(model, optimizer, torch.randn(6, 2, 4, 4), 5)


def test_pc_layers_do_not_make_the_host_wait() -> None:
    with cuda_without_waiting():
        model = nn.Sequential(Linear(8, 8), Linear(8, 4))
        add_pc_layers(model, layers=[""])
        dopr = {"refresh_every": 2, "pc_gradient": "effective"}
        optimizer = build_optimizer(model, "muon", 1e-3, dopr=dopr)
        for step in range(3):
            train(model, optimizer, torch.randn(6, 8), 1)
            optimizer.precondition(0, torch.randn(8, 8))
            update_spectral_norms(model, step)


class Pair(nn.Module):
    """Two layers that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def test_shared_statistics_do_not_make_the_host_wait() -> None:
    with cuda_without_waiting():
        model = Pair()
        optimizer = build_optimizer(model, "adamw", 1e-3, dopr={"refresh_every": 2})
        train(model, optimizer, torch.randn(6, 4), 5)
        assert optimizer.statistics.moments[1].shared_with is optimizer.statistics.moments[0]


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """This process as one of two, whose collectives leave tensors as they are."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("gp", ["adamw", "muon"])
def test_of_several_processes_only_the_first_refresh_waits(gp: str) -> None:
    """It agrees with the others on which layers share a statistic."""
    with cuda_without_waiting():
        model = Pair()
        optimizer = build_optimizer(model, gp, 1e-3, dopr={"refresh_every": 2})
        left, right = optimizer.statistics.moments
        optimizer.statistics.sharing_decided = True  # what the first refresh comes to
        right.shared_with = left
        train(model, optimizer, torch.randn(6, 4), 5)


def test_powers_wait_for_eigenvalues() -> None:
    """The one documented exception; torch has no eigenvalues without a check."""
    with cuda_without_waiting():
        model = small_model()
        optimizer = build_optimizer(model, "adamw", 1e-3, dopr={"power": 0.5})
        with pytest.raises(WaitError, match="eigh"):
            train(model, optimizer, torch.randn(6, 2, 4, 4), 1)


@pytest.mark.usefixtures("two_ranks")
def test_each_rank_factors_its_share_of_each_size() -> None:
    sides = [4, 8, 4, 8, 4, 2]
    first = own_share(sides)
    with mock.patch("torch.distributed.get_rank", return_value=1):
        second = own_share(sides)
    assert sorted([*first, *second]) == list(range(6))
    assert len(first) == len(second) == 3
    assert {sides[i] for i in first} >= {4, 8} <= {sides[i] for i in second}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("gp", ["adamw", "muon"])
def test_on_a_real_device_torch_finds_no_waiting_either(gp: str) -> None:
    equal = [nn.Linear(8, 8) for _ in range(3)]  # of one size: a batch of matrices
    model = nn.Sequential(small_model(), nn.Linear(3, 8), *equal).to("cuda")
    optimizer = build_optimizer(model, gp, 1e-3, dopr={"refresh_every": 2})
    x = torch.randn(6, 2, 4, 4, device="cuda")
    for step in range(7):
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
