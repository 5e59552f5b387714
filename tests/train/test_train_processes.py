"""The number of processes and of accumulation steps changes rounding at most."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from tiny import again, tiny, tiny_file, weights

from flowdopr.config import ConfigError
from flowdopr.train import train


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_close_weights(run, other, step):
    for name in ("model", "ema-0.9"):
        mine, theirs = weights(run, step, name), weights(other, step, name)
        for key in mine:
            torch.testing.assert_close(mine[key], theirs[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("optimizer", ["adamw", "dopr-muon"])
def test_two_processes_equal_one(tmp_path, optimizer):
    settings = [f"optimizer.name={optimizer}", "optimizer.eps=1e-4"]
    one = train(tiny(tmp_path, *settings, "name=one"))
    path, shared = tiny_file(tmp_path, *settings, "name=two")
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", "1", "--main_process_port", str(free_port())),
        *("-m", "flowdopr", "train", str(path), *shared),
    ]
    done = subprocess.run(
        command, env=dict(os.environ), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("runs/two")
    assert_close_weights(one, tmp_path / "runs" / "two", 8)


@pytest.mark.parametrize("optimizer", ["adamw", "dopr-adamw"])
def test_accumulation_equals_the_whole_batch(tmp_path, optimizer):
    config = tiny(tmp_path, f"optimizer.name={optimizer}", "optimizer.eps=1e-4")
    whole = train(again(config, "name=whole"))
    parts = train(again(config, "name=parts", "train.accumulation_steps=4"))
    assert_close_weights(whole, parts, 8)


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"not a multiple of train\.accumulation_steps 3"):
        tiny(tmp_path, "train.accumulation_steps=3")
