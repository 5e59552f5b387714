"""Optimizers for any `nn.Module`: DoPr, and the gradient preconditioners it wraps."""

from flowdopr.linalg import newton_schulz
from flowdopr.optim.adamuon import AdaMuon
from flowdopr.optim.build import OPTIMIZER_NAMES, build_optimizer
from flowdopr.optim.dopr import DoPr, LayerRule
from flowdopr.optim.dopr.reports import DeferredRead
from flowdopr.optim.kfac import KFAC
from flowdopr.optim.muon import Muon
from flowdopr.optim.outside import averages_itself
from flowdopr.optim.roles import (
    Role,
    check_claimed,
    format_roles,
    parameter_groups,
    parameter_roles,
)
from flowdopr.optim.rownorm import RowNorm
from flowdopr.optim.signum import Signum

__all__ = [
    "KFAC",
    "OPTIMIZER_NAMES",
    "AdaMuon",
    "DeferredRead",
    "DoPr",
    "LayerRule",
    "Muon",
    "Role",
    "RowNorm",
    "Signum",
    "averages_itself",
    "build_optimizer",
    "check_claimed",
    "format_roles",
    "newton_schulz",
    "parameter_groups",
    "parameter_roles",
]
