"""Shared by all tests: one thread a process, so that results and timings do not depend on how many
tests run beside each other; small configs; and images on disk made on the spot."""

import os
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Extractors trained by tests stay out of the user's cache; shared by the test processes of a run.
os.environ.setdefault("FLOWDOPR_CACHE", tempfile.mkdtemp(prefix="flowdopr-tests-"))

from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

from flowdopr.config import Config, DataConfig, DiTConfig, TrainConfig, own

torch.set_num_threads(1)
# The same examples in every run, so that a change that breaks nothing fails nothing.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def make_config():
    """`make_config(name="digits", batch=8, ...)`: a config whose `data` has the other values."""

    def make(batch: int = 8, seed: int = 0, **data) -> Config:
        return Config(
            name="test",
            seed=seed,
            data=DataConfig(**data),
            model=DiTConfig(name="dit"),
            train=TrainConfig(steps=1, global_batch_size=batch),
        )

    return make


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """`own_module("mine", "text")` writes mine.py to the current folder, which is the test's."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(own, "_digests", {})
    yield lambda name, text: Path(f"{name}.py").write_text(text)
    for name in set(sys.modules) - before:
        if Path(str(getattr(sys.modules[name], "__file__", ""))).parent == tmp_path:
            del sys.modules[name]


@pytest.fixture
def write_images():
    """`write_images(folder, {"cat": 3, "dog": 2})` writes that many PNGs to each sub-folder."""

    def write(folder: Path, counts: dict[str, int], size: int = 8) -> Path:
        noise = np.random.default_rng(0)
        for name, count in counts.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = noise.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name / f"{number}.png")
        return folder

    return write
