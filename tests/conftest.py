"""Settings shared by all tests: one thread a process, so that results and timings do not depend on
how many tests run beside each other."""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Extractors trained by tests stay out of the user's cache; shared by the test processes of a run.
os.environ.setdefault("FLOWDOPR_CACHE", tempfile.mkdtemp(prefix="flowdopr-tests-"))

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
