"""The memory of a process."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from flowdopr.processes import keep_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    return [torch.ones(2**21) for _ in range(4)]
def faults_of_ten_steps():
    step(), step()
    before = faults()
    for _ in range(10):
        step()
    return faults() - before
default = faults_of_ten_steps()
keep_freed_memory()
print(default, faults_of_ten_steps())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of Linux's C library")
def test_freed_memory_is_not_asked_for_again():
    said = subprocess.check_output([sys.executable, "-c", FAULTS], text=True)
    default, kept = map(int, said.split())
    # Of 81,920 pages of all tensors together, the library asks for all again or for an eighth.
    assert default > 9_000
    assert kept < 8_000
