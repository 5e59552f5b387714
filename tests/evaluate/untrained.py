"""Runs on the digits that were never trained: their config, and checkpoints of random weights."""

from pathlib import Path

import torch

from flowdopr.config import Config, DataConfig, DiTConfig, EvaluateConfig, SampleConfig, TrainConfig
from flowdopr.config.sample import OneStepSolver
from flowdopr.models import build_model
from flowdopr.runs import RunFolder, averages_of


def make_config(output: Path, *, class_conditional: bool = True) -> Config:
    return Config(
        name="tiny",
        output=str(output),
        data=DataConfig(name="digits"),
        model=DiTConfig(
            name="dit", depth=1, hidden_size=16, num_heads=2, class_conditional=class_conditional
        ),
        train=TrainConfig(steps=2, global_batch_size=8),
        sample=SampleConfig(solver=OneStepSolver(name="euler", steps=2)),
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
