"""The command line: Ctrl-C before a command begins, and paths that start with a tilde."""

import subprocess
import sys
from pathlib import Path

import pytest

from flowdopr.cli import run_command
from flowdopr.config import apply_overrides, to_yaml

INTERRUPTED_IMPORT = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from flowdopr.cli import main
main(["train", *sys.argv[2:]])
"""


@pytest.mark.parametrize("module", ["typer", "flowdopr.config", "torch", "numpy", "accelerate"])
def test_an_early_interrupt_ends_in_one_line(tmp_path, module):
    config = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
    command = [sys.executable, "-c", INTERRUPTED_IMPORT, module, str(config), f"output={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.endswith("flowdopr: stopped before it began\n")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


PATHS = [
    "output=~/here",
    "data.root=~/here",
    "data.held_out_root=~/here",
    "train.init_from=~/here",
    "sample.guidance={scale: 2, guide: {run: ~/here}}",
    "evaluate.extractor={name: inception, weights: ~/here}",
    "evaluate={metrics: [fd], reference: ~/here}",
    "data={name: latents, root: ~/here, autoencoder: ~/here, source_root: ~/here}",
]


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch, make_config, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for override in PATHS:
        found = to_yaml(apply_overrides(make_config(name="folder"), [override]))
        assert found.count(f"{tmp_path}/here") == override.count("~")
    assert run_command(["sample", "~/here", "--out=~/samples"]) == 2
    assert f"{tmp_path}/here: not a run folder" in capfd.readouterr().err


def test_peak_memory_is_that_of_this_process_alone():
    code = (
        "import torch; from flowdopr.processes import peak_memory_mib as peak;"
        "print(before := peak(torch.device('cpu'))); torch.ones(10**8);"
        "print(peak(torch.device('cpu')) - before)"
    )
    ballast = b"x" * (2 * 10**9)  # the new process begins as a copy of this one
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(ballast) / 2**20 > 1900
    before, added = map(float, done.stdout.split())
    assert 10 < before < 1500
    assert 300 < added < 500  # 4 bytes a number
