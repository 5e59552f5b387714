"""A run on the digits that takes a second, shared by the tests of this folder."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from flowdopr.config import Config, apply_overrides, load_config
from flowdopr.runs import RunFolder

YAML = """
name: tiny
data: {name: digits}
model: {name: dit, depth: 1, hidden_size: 16, num_heads: 2, patch_size: 4}
optimizer: {name: adamw, lr: 3e-3}
train: {steps: 8, global_batch_size: 16, ema_decays: [0.9], log_every: 2}
sample: {solver: {name: euler, steps: 2}, num_images: 4}
"""


def tiny_file(folder: Path, *overrides: str) -> tuple[Path, list[str]]:
    """A config file in `folder`, and overrides that put its runs there too."""
    path = folder / "tiny.yaml"
    path.write_text(YAML)
    return path, [f"output={folder}/runs", *overrides]


def tiny(folder: Path, *overrides: str) -> Config:
    path, settings = tiny_file(folder, *overrides)
    return load_config(path, settings)


def again(config: Config, *overrides: str) -> Config:
    return apply_overrides(config, overrides)


def weights(run: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def free_port() -> str:
    """The number of a port of this machine that nothing uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_two(*arguments: str) -> list[subprocess.Popen]:
    """`python ARGUMENTS` in two processes that are connected by gloo, by rank."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]


def assert_same_checkpoint(run: Path, other: Path, step: int) -> None:
    """Raw and averaged weights and the whole optimizer state are bitwise equal."""
    for name in ("model", "ema-0.9"):
        mine, theirs = weights(run, step, name), weights(other, step, name)
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert torch.equal(mine[key], theirs[key]), f"{name}: {key}"
    states = [
        torch.load(path / "checkpoints" / f"step-{step:08d}" / "state.pt", weights_only=True)
        for path in (run, other)
    ]
    assert_equal(*states)


def assert_equal(a, b) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def without_times(path: Path) -> list[dict]:
    """The lines of metrics.jsonl, less what a machine's speed and memory decide."""
    kept = {"step", "images", "loss", "lr", "grad_norm", "held_out_loss"}
    lines = RunFolder.open(path).metrics()
    return [{key: line[key] for key in kept & line.keys()} for line in lines]
