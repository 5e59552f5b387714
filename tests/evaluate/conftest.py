"""A run that was never trained, and one classifier cache for the whole session."""

from pathlib import Path

import pytest
import torch

from flowdopr.config import Config, DataConfig, DiTConfig, EvaluateConfig, SampleConfig, TrainConfig
from flowdopr.data import Datasets, build_datasets
from flowdopr.models import build_model
from flowdopr.train.run_folder import RunFolder, averages_of


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWDOPR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make_config(output: Path, *, class_conditional: bool = True) -> Config:
    return Config(
        name="tiny",
        output=str(output),
        data=DataConfig(name="digits"),
        model=DiTConfig(
            name="dit", depth=1, hidden_size=16, num_heads=2, class_conditional=class_conditional
        ),
        train=TrainConfig(steps=2, global_batch_size=8),
        sample=SampleConfig(solver="euler", steps=2),
        evaluate=EvaluateConfig(fid_num_images=40),
    )


def save_random_checkpoint(run: RunFolder, step: int) -> None:
    """Weights that are random everywhere, so that labels and times matter."""
    torch.manual_seed(step)
    model = build_model(run.config, run.dataset.image_shape, run.dataset.num_classes)
    raw, ema = (
        {name: value + 0.2 * torch.randn_like(value) for name, value in model.state_dict().items()}
        for _ in range(2)
    )
    averages = {average.name: ema for average in averages_of(run.config)}
    run.save_checkpoint(step, model=raw, averages=averages, state={}, note={})


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Datasets:
    return build_datasets(make_config(tmp_path_factory.mktemp("unused")))


@pytest.fixture
def make_run(tmp_path, digits):
    """`make_run()` -> a run folder with random weights at steps 1 and 2."""

    def make(**settings) -> RunFolder:
        run = RunFolder.create(make_config(tmp_path, **settings), digits.info, {}, resume=False)
        for step in (1, 2):
            save_random_checkpoint(run, step)
        return run

    return make
