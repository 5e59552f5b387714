"""The launches that configs/accelerate/ describes, on a machine without GPUs (by gloo)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from tiny import free_port, tiny_file

from flowdopr.runs import RunFolder

FILES = Path(__file__).parents[2] / "configs" / "accelerate"
KINDS = {"one_gpu": "NO", "gpus": "MULTI_GPU", "fsdp2": "FSDP", "nodes": "MULTI_GPU"}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]


def test_accelerate_reads_every_file():
    assert {path.stem for path in FILES.glob("*")} == KINDS.keys()
    for name, kind in KINDS.items():
        assert load_config_from_file(str(FILES / f"{name}.yaml")).distributed_type == kind


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_launch_trains(tmp_path, name):
    """On two processes where it is not for one; those of two machines are both on this one."""
    path, shared = tiny_file(tmp_path)
    command = [*LAUNCH, str(FILES / f"{name}.yaml")]
    port = free_port()
    machines = [["--machine_rank", rank, "--main_process_port", port] for rank in "01"]
    launches = [
        subprocess.Popen(
            [*command, *options, "-m", "flowdopr", "train", str(path), *shared],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for options in (machines if name == "nodes" else [[]])
    ]
    said = [launch.communicate(timeout=250) for launch in launches]
    assert [launch.returncode for launch in launches] == [0] * len(launches), said
    run = RunFolder.open(tmp_path / "runs" / "tiny")
    assert run.steps() == [8]
    assert run.made_by()["processes"] == (1 if name == "one_gpu" else 2)
