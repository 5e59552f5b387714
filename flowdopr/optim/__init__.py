"""Optimizers for any `nn.Module`: DoPr, and the gradient preconditioners it wraps."""

from .muon import Muon, newton_schulz
from .roles import Role, check_claimed, format_roles, parameter_groups, parameter_roles
from .signum import Signum

__all__ = [
    "Muon",
    "Role",
    "Signum",
    "check_claimed",
    "format_roles",
    "newton_schulz",
    "parameter_groups",
    "parameter_roles",
]
