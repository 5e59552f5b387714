"""The parts of a run that are built of its config before the loop begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowdopr.flow import FlowMatching, Sampling
from flowdopr.runs import Average


@dataclass(frozen=True)
class Components:
    """What a config describes, each built once: see `start.build_components`.

    The guide model and the decoder of the sample grids stay on the training device: their weights
    take little memory beside gradients, optimizer state and activations.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: FlowMatching
    averages: Sequence[Average]
    sampling: Sampling
    guide_model: nn.Module | None
    decode: Callable[[Tensor], Tensor]
    initial: dict[str, Any]
    """For versions.json: the file that the weights started from, if any."""
    sharded: bool
    """Whether the processes share out the weights: see `shards`."""
