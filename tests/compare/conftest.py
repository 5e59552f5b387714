"""A study small enough for tests: a tiny DiT on the digits, two arms, two seeds."""

from pathlib import Path

import pytest

from flowdopr.config import Config, load_config

STUDY = """
name: tiny
output: {output}
data: {{name: digits}}
model: {{name: dit, patch_size: 4, hidden_size: 16, depth: 1, num_heads: 2}}
optimizer: {{name: adamw}}
train:
  steps: 8
  global_batch_size: 16
  log_every: 2
  checkpoint_every: 4
  ema_decays: [0.9]
sample: {{solver: {{name: euler, steps: 2}}, num_images: 16}}
evaluate: {{metrics: [fd], fid_num_images: 40}}
compare:
  seeds: [0, 1]
  nfe_steps: [1, 2]
  workers: 2
  arms:
    - {{name: AdamW, lrs: [1e-3]}}
    - {{name: DoPr-AdamW, lrs: [1e-3], set: {{optimizer.name: dopr-adamw}}}}
"""


def study_in(folder: Path) -> Config:
    path = folder / "study.yaml"
    path.write_text(STUDY.format(output=folder))
    return load_config(path)


@pytest.fixture
def study(tmp_path: Path) -> Config:
    return study_in(tmp_path)


@pytest.fixture(scope="module")
def shared_study(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return study_in(tmp_path_factory.mktemp("study"))
