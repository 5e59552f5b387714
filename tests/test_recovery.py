"""Runs that are harmed at random are resumed as if nothing had happened."""

import subprocess
import sys

import pytest
from script_modules import SCRIPTS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_random_harm_changes_no_number(tmp_path):
    """Stopped and repeated, the script goes on with the tries that are left."""
    command = [sys.executable, str(SCRIPTS / "recovery.py"), "--out", str(tmp_path)]
    tables = []
    for tries in ("10", "20"):
        done = subprocess.run(
            [*command, "--tries", tries, "--two", "2"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        tables.append(done.stdout)
    assert len((tmp_path / "tries.jsonl").read_text().splitlines()) == 22
    assert "| all |  | 12 | 12 | 0 | 0 | 0 | 0 |" in tables[0]
