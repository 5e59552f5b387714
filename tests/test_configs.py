"""Every file in configs/ is loaded and built: model, optimizer with DoPr, objective, sampling."""

from pathlib import Path

import pytest
import torch

from flowdopr.config import load_config, to_yaml
from flowdopr.config.yaml12 import parse_yaml
from flowdopr.flow import build_objective, build_sampling
from flowdopr.models import build_model
from flowdopr.optim import build_optimizer, format_roles

FILES = sorted((Path(__file__).parent.parent / "configs").glob("**/*.yaml"))
SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28)}


def has_base_only(path: Path) -> bool:
    """Data-set files are bases for others: they say nothing of a model or a run."""
    return set(parse_yaml(path.read_text())) <= {"data", "evaluate"}


def test_there_are_configs():
    assert len(FILES) >= 8


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_loads_and_builds(path):
    if has_base_only(path):
        extra = ["name=x", "model.name=dit", "train.steps=1", "train.global_batch_size=1"]
        load_config(path, extra)
        return
    text = path.read_text()
    assert text.startswith("#"), "a config begins with a comment: command, hardware, expectation"
    assert "flowdopr" in text, "the comment gives the command"
    config = load_config(path)
    assert to_yaml(config)
    channels, side, _ = SHAPES.get(config.data.name, (3, 32, 32))
    side = config.data.image_size or side
    with torch.device("meta"):
        model = build_model(config, (channels, side, side), 10)
        for name in (config.optimizer.name, "dopr-adamw"):
            options = config.optimizer.model_dump() | {"name": name}
            if name != config.optimizer.name:
                options = {"name": name, "lr": 1e-3}
            optimizer = build_optimizer(model, **options)
            assert format_roles(model, optimizer)
    build_objective(config)
    build_sampling(config)
