"""The memory of a process."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from flowdopr.processes import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    return [torch.ones(2**21) for _ in range(4)]
step(), step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of Linux's C library")
def test_freed_memory_is_not_asked_for_again():
    counts = {
        mode: int(subprocess.check_output([sys.executable, "-c", FAULTS, mode], text=True))
        for mode in ("default", "keep")
    }
    # Of 81,920 pages of all tensors together, the library asks for all again or for an eighth.
    assert counts["default"] > 9_000
    assert counts["keep"] < 8_000
