"""The benchmark script runs and writes what it promises; its numbers mean nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quick_benchmark_writes_ratios(tmp_path):
    file = tmp_path / "benchmark.json"
    command = [sys.executable, "scripts/benchmark_optim.py", "--quick", "--gps", "sgd"]
    command += ["--models", "dit-xxs-quick", "--device", "cpu", "--json", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    report = json.loads(file.read_text())
    assert report["machine"]["commit"]
    (result,) = report["results"]
    assert set(result["arms"]) == {"gp", "dopr", "dopr exact"}
    assert result["arms"]["gp"]["time_ratio"] == result["arms"]["gp"]["memory_ratio"] == 1
    assert all(arm["memory_bytes"] > 0 for arm in result["arms"].values())
