"""Double preconditioning (DoPr), usable alone on any `nn.Module`; `dopr` says what is where."""

from flowdopr.optim.dopr.dopr import DoPr
from flowdopr.optim.dopr.layers import LayerRule
from flowdopr.optim.dopr.reports import Diagnostics

__all__ = ["Diagnostics", "DoPr", "LayerRule"]
