"""The benchmark runs and writes what it promises; its numbers mean nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "part", "arms"),
    [
        ("--images 300 --workers 0 --batches 1", "0 workers", "folder zip tar cache peer"),
        ("--start 11000", "start", "folder zip tar"),
    ],
)
def test_the_benchmark_writes_ratios(tmp_path, options, part, arms):
    file = tmp_path / "benchmark.json"
    command = [sys.executable, "scripts/benchmark_data.py", "--rounds", "1", "--json", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *options.split()], cwd=ROOT, check=True, env=environment)
    report = json.loads(file.read_text())
    assert report["machine"]["commit"]
    assert list(report[part]) == arms.split()
    assert all(arm["ratio"] > 0 for arm in report[part].values())
