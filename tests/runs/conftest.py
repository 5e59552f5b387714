"""Makes run folders without training."""

import pytest
from stored import INFO

from flowdopr.config import apply_overrides
from flowdopr.data import DatasetInfo
from flowdopr.runs import RunFolder, begin_run


@pytest.fixture
def create(make_config, tmp_path):
    """`create("train.keep_checkpoints=2", ...)` -> a run folder, new or to be resumed."""

    def run(
        *overrides: str, resume: bool = False, info: DatasetInfo = INFO, commit: str = "one"
    ) -> RunFolder:
        settings = [f"output={tmp_path}", "name=run", "train.steps=8", *overrides]
        config = apply_overrides(make_config(name="digits"), settings)
        return begin_run(config, info, {"commit": commit}, resume=resume)

    return run
