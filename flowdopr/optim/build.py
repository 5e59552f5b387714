"""Optimizers by name, for a model.

    build_optimizer(model, "muon", 1e-3, weight_decay=0.01, dopr={"damping": 0.1})

An option that the named optimizer does not use is refused, never ignored.
"""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flowdopr.linalg import laid_out_like
from flowdopr.optim.adamuon import AdaMuon
from flowdopr.optim.base import Float32Step
from flowdopr.optim.dopr import DoPr
from flowdopr.optim.kfac import KFAC
from flowdopr.optim.muon import Muon
from flowdopr.optim.outside import outside
from flowdopr.optim.roles import parameter_groups
from flowdopr.optim.rownorm import RowNorm
from flowdopr.optim.signum import Signum


class SGD(Float32Step, torch.optim.SGD):
    """torch's, with the precision of steps that all optimizers here have."""


class AdamW(Float32Step, torch.optim.AdamW):
    """torch's, with the precision of steps that all optimizers here have."""


def sgd(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> SGD:
    """torch's SGD; its weight decay is added to the gradient and so passes through the momentum.

    Args:
        momentum: decay rate of the momentum buffer; 0 is plain gradient descent.
        nesterov: whether the momentum is Nesterov's.
    """
    groups = parameter_groups(model, "sgd", weight_decay=weight_decay)
    return SGD(groups, lr, momentum=momentum, nesterov=nesterov)


def adamw(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> AdamW:
    """torch's AdamW, fused where it can be, weight decay for matrices and convolutions only.

    Args:
        betas: decay rates of the averages of the gradient and of its square.
        eps: added to the square root in the denominator.
    """
    groups = parameter_groups(model, "adamw", weight_decay=weight_decay)
    fused = _can_fuse([parameter for group in groups for parameter in group["params"]])
    optimizer = AdamW(groups, lr, betas=betas, eps=eps, fused=fused or None)
    # A GradScaler then unscales, and skips the step of an overflow itself, as for any optimizer:
    # accelerate would not notice the skip inside the fused kernel.
    optimizer._step_supports_amp_scaling = False
    optimizer.register_load_state_dict_post_hook(_lay_out_state)
    return optimizer


def _can_fuse(parameters: list[nn.Parameter]) -> bool:
    """Whether torch's fused kernels take these parameters, which must have no gaps in memory: see
    `laid_out_like`. Autograd gives gradients the strides of their weights."""
    return all(
        p.device.type in ("cpu", "cuda")
        and p.is_floating_point()
        and (p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last))
        for p in parameters
    )


def _lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded state the strides of its weights, which may have had others when it was saved."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                state[name] = laid_out_like(value, parameter)


def signum(
    model: nn.Module, lr: float, *, weight_decay: float = 0.0, momentum: float = 0.9
) -> Signum:
    """Signum for every parameter, weight decay for matrices and convolutions only.

    Args:
        momentum: decay rate of the momentum buffer; 0 gives signSGD.
    """
    groups = parameter_groups(model, "signum", weight_decay=weight_decay)
    return Signum(groups, lr, momentum=momentum)


def soap(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.95, 0.95),
    eps: float = 1e-8,
    precondition_frequency: int = 10,
) -> torch.optim.Optimizer:
    """SOAP (Vyas et al., arXiv 2409.11321) as the library pytorch-optimizer has it: Adam in the
    eigenbasis of Shampoo's factors, renewed every `precondition_frequency` steps. Its first step
    only gathers the factors.

    Args:
        betas: decay rates of Adam's first average, and of its second and of the factors.
        eps: added to Adam's denominator.
        precondition_frequency: steps between renewals of the eigenbasis.
    """
    options = {"betas": betas, "eps": eps, "precondition_frequency": precondition_frequency}
    path = "pytorch_optimizer.SOAP"
    return outside(model, lr, class_path=path, weight_decay=weight_decay, options=options)


OPTIMIZERS = {
    "sgd": sgd,
    "adamw": adamw,
    "muon": Muon,
    "signum": signum,
    "adamuon": AdaMuon,
    "rownorm": RowNorm,
    "soap": soap,
    "kfac": KFAC,
    "outside": outside,
}
OPTIMIZER_NAMES = tuple(OPTIMIZERS)


def build_optimizer(
    model: nn.Module, name: str, lr: float, *, dopr: Mapping[str, Any] | None = None, **options: Any
) -> torch.optim.Optimizer:
    """The optimizer called `name` on all trainable parameters of `model`.

    Args:
        name: a key of `OPTIMIZERS`.
        lr: learning rate.
        dopr: keyword arguments of `DoPr`, which then wraps the optimizer: `{}` for its defaults.
            `rules` may be `LayerRule`s or dicts of their fields. None: no `DoPr`.
        options: keyword arguments of the optimizer (weight_decay, betas, eps, momentum, ...).

    Raises:
        ValueError: an unknown name, an option that this optimizer or DoPr does not use, or a value
            that it refuses.
    """
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1, cutoff=0.7)
        hint = f"did you mean '{near[0]}'?" if near else f"one of {', '.join(OPTIMIZERS)}"
        raise ValueError(f"optimizer '{name}' is not known: {hint}")
    recipe = OPTIMIZERS[name]
    _check_options(f"optimizer '{name}'", recipe, options)
    _check_options("DoPr", DoPr, dopr or {})
    optimizer = recipe(model, lr, **options)
    return optimizer if dopr is None else DoPr(optimizer, model, **dopr)


def _check_options(who: str, function: Any, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    uses = sorted(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    for key in options:
        if key not in uses:
            raise ValueError(f"{who} does not use '{key}': it uses {', '.join(uses)}")
