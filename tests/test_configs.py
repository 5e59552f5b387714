"""Every file in configs/ is loaded and built: model, optimizer with DoPr, objective, sampling."""

from pathlib import Path

import pytest
import torch

from flowdopr.config import DoPrConfig, apply_overrides, load_config, to_dict, to_yaml
from flowdopr.config.yaml12 import parse_yaml
from flowdopr.flow import build_objective, build_sampling
from flowdopr.models import build_model
from flowdopr.optim import build_optimizer, format_roles
from flowdopr.train.start import optimizer_arguments

FILES = sorted((Path(__file__).parent.parent / "configs").glob("**/*.yaml"))
RECIPES = Path(__file__).parent.parent / "configs" / "recipes"
SHAPES = {
    **dict.fromkeys(("mnist", "fashion_mnist"), (1, 28, 28)),
    "digits": (1, 8, 8),
    "latents": (4, 32, 32),  # of ImageNet at 256x256
}
CLASSES = {"latents": 1000}
# Parameters of the sources' models: SiT without the discarded half of its head's 2 x 2 x 8 outputs.
PARAMETERS = {
    "sit-s2": 33.0e6,
    "sit-b2": 130.5e6,
    "sit-l2": 458.1e6,
    "sit-xl2": 675.1e6,
    "torchcfm-cifar10": 35_746_307,
    "flow_matching-cifar10": 55_676_419,
    "edm-cifar10": 57.1e6,  # ours; the source's has 55.7e6
}


def model_of(config):
    """The model of a config on the meta device, for the images that its data set has."""
    channels, side, _ = SHAPES.get(config.data.name, (3, 32, 32))
    side = config.data.image_size or side
    with torch.device("meta"):
        return build_model(config, (channels, side, side), CLASSES.get(config.data.name, 10))


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
    model = model_of(config)
    with torch.device("meta"):
        for chosen in (config, apply_overrides(config, ["optimizer=dopr-adamw"])):
            optimizer = build_optimizer(model, **optimizer_arguments(chosen))
            assert format_roles(model, optimizer)
    build_objective(config)
    build_sampling(config)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_has_its_sources_size_and_a_twin_with_dopr(name):
    config, twin = (load_config(RECIPES / f"{name}{end}.yaml") for end in ("", "-dopr"))
    count = sum(p.numel() for p in model_of(config).parameters())
    assert count == pytest.approx(PARAMETERS[name], rel=0.005)
    left, right = (to_dict(item) for item in (config, twin))
    dopr = right["optimizer"]["dopr"]
    assert dopr == DoPrConfig().model_dump(mode="json")
    assert right == left | {"name": twin.name, "optimizer": left["optimizer"] | {"dopr": dopr}}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_tells_where_it_is_from_and_claims_nothing(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    assert "in the source" in text
    assert "it has not been repeated here" in text.replace("\n# ", " ")
