"""The benchmark scripts run and write what they promise; their numbers mean nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_quick(script: str, file: Path, options: list[str]) -> dict:
    command = [sys.executable, script, "--quick", "--device", "cpu", "--json", str(file), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    return json.loads(file.read_text())


@pytest.mark.slow
def test_quick_benchmark_writes_ratios(tmp_path):
    options = ["--gps", "sgd", "--models", "dit-xxs-quick", "--also", '{"max_rows": 8}']
    report = run_quick("scripts/benchmark_optim.py", tmp_path / "benchmark.json", options)
    assert report["machine"]["commit"]
    (result,) = report["results"]
    assert set(result["arms"]) == {"gp", "dopr", "dopr exact", "dopr also"}
    assert result["arms"]["gp"]["time_ratio"] == result["arms"]["gp"]["memory_ratio"] == 1
    assert all(arm["memory_bytes"] > 0 for arm in result["arms"].values())


@pytest.mark.slow
def test_every_trick_is_measured(tmp_path):
    report = run_quick("scripts/benchmark_tricks.py", tmp_path / "tricks.json", [])
    for rows in report["results"].values():
        assert len(rows) == 9
        assert all(row["gather"] > 0 and row["refresh"] > 0 for row in rows.values())
        # Refreshing at each step is 16 times the work: a trick that is off is really off.
        assert rows["no refresh interval"]["total"] > 2 * rows["all"]["total"]
    unet = report["results"]["unet-quick"]
    assert unet["no shared kernel offsets"]["refresh"] > unet["all"]["refresh"]
