"""Optimizers of torch and of pytorch-optimizer inside DoPr: wrapped, or refused for a reason."""

import inspect

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn

from flowdopr.optim.dopr import DoPr
from flowdopr.optim.dopr.dopr import READS_WEIGHTS

OF_TORCH = [
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
    "ASGD",
]
OTHERS = [
    "ADOPT",
    "AdEMAMix",
    "AdaBelief",
    "AdaBound",
    "AdaNorm",
    "AdamC",
    "AdamS",
    "Adan",
    "AggMo",
    "CAME",
    "DiffGrad",
    "Fira",
    "GaLore",
    "Gravity",
    "Kron",
    "LaProp",
    "Lion",
    "NovoGrad",
    "PNM",
    "QHAdam",
    "QHM",
    "SCION",
    "SGDW",
    "SM3",
    "SOAP",
    "SPAM",
    "ScalableShampoo",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "Shampoo",
    "SignSGD",
    "StableAdamW",
    "Tiger",
    "Yogi",
    "Prodigy",
    "DAdaptAdam",
]
READERS = [
    "A2Grad",
    "AccSGD",
    "AdaSmooth",
    "Adalite",
    "AdamP",
    "Amos",
    "FOCUS",
    "FTRL",
    "Fromage",
    "LARS",
    "Lamb",
    "MADGRAD",
    "MARS",
    "Magma",
    "Nero",
    "Ranger",
    "Ranger21",
    "SGDP",
    "SRMM",
]
CLASSES = {f"torch.{name}": getattr(torch.optim, name) for name in OF_TORCH}
CLASSES |= {name: getattr(pytorch_optimizer, name) for name in (*OTHERS, *READERS)}
pytestmark = pytest.mark.filterwarnings("ignore")


def build(kind: type[torch.optim.Optimizer], model: nn.Module) -> torch.optim.Optimizer:
    known = inspect.signature(kind).parameters
    wanted = {"lr": 0.01, "weight_decay": 0.0, "num_iterations": 100}
    return kind(model.parameters(), **{k: v for k, v in wanted.items() if k in known})


@pytest.mark.parametrize("name", CLASSES)
def test_each_can_be_wrapped(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    optimizer = DoPr(build(CLASSES[name], layer), layer)
    before = layer.weight.detach().clone()
    for _ in range(8):
        optimizer.zero_grad()
        layer(torch.randn(9, 6)).square().sum().backward()
        optimizer.step()
    assert torch.isfinite(layer.weight).all()
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", ["SophiaH", "AdaHessian", "AliG", "LBFGS"])
def test_those_that_evaluate_the_loss_are_refused(name: str) -> None:
    layer = nn.Linear(6, 4)
    gp = build(getattr(pytorch_optimizer, name), layer)
    with pytest.raises(ValueError, match=f"{name} evaluates the loss itself"):
        DoPr(gp, layer)


def moves(kind: type[torch.optim.Optimizer], from_zero: bool) -> Tensor:
    """Eight steps on fixed gradients, from the weights as they are or from zeros each time."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    optimizer = build(kind, model)
    generator, steps = torch.Generator().manual_seed(5), []
    for step in range(8):
        for p in model.parameters():
            p.data.mul_(not from_zero)
            p.grad = torch.randn(p.shape, generator=generator)
        before = [p.detach().clone() for p in model.parameters()]
        torch.manual_seed(step)
        optimizer.step()
        pairs = zip(model.parameters(), before, strict=True)
        steps.append(torch.cat([(p.detach() - old).flatten() for p, old in pairs]))
    return torch.stack(steps)


@pytest.mark.parametrize("name", CLASSES)
def test_the_sandwich_takes_only_those_that_do_not_read_the_weights(name: str) -> None:
    kind, layer = CLASSES[name], nn.Linear(6, 4)
    steps, from_zero = moves(kind, False), moves(kind, True)
    if (steps - from_zero).abs().max() > 1e-3 * steps.abs().max():
        with pytest.raises(ValueError, match=f"{kind.__name__} reads them"):
            DoPr(build(kind, layer), layer, form="sandwich")
    else:
        assert name not in READERS
        assert not READS_WEIGHTS.search(kind.__name__) or kind is torch.optim.ASGD
