"""`python poison.py '{"kind": "output", "steps": [3]}' train ...` is `flowdopr train ...` where one
layer gives numbers that are not finite at some steps, counted from 0, in one process."""

import json
import sys
from collections.abc import Collection

import torch

from flowdopr.cli import main
from flowdopr.train import start
from flowdopr.train.schedule import derive_seed

LAYER = "blocks.0.mlp.down"


def poison(kind: str, steps: Collection[int], rank: int = 0, seed: int = 0) -> None:
    """Spoil the forward passes of training at these steps.

    Args:
        kind: "output" of the layer is NaN; "loss" overflows, because the last layer's output is
            large but finite; "gradient" of the layer's output is infinite.
    """
    build = start.build_components
    seeds = {derive_seed(seed, step, 1 + rank) for step in steps}

    def spoil(_, inputs, output):
        if torch.initial_seed() not in seeds or not output.requires_grad:
            return output
        if kind == "gradient":
            output.register_hook(lambda gradient: gradient * torch.inf)
        return output * {"output": torch.nan, "loss": 1e25, "gradient": 1.0}[kind]

    def build_spoilt(*arguments, **settings):
        components = build(*arguments, **settings)
        layer = "final" if kind == "loss" else LAYER
        components.model.get_submodule(layer).register_forward_hook(spoil)
        return components

    start.build_components = build_spoilt


if __name__ == "__main__":
    poison(**json.loads(sys.argv.pop(1)))
    main()
