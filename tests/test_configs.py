"""Every file in configs/ is loaded and built: model, optimizer with DoPr, objective, sampling."""

import re
from pathlib import Path

import pytest
import torch

from flowdopr.config import (
    ConfigError,
    DoPrConfig,
    apply_overrides,
    load_config,
    shipped,
    to_dict,
    to_yaml,
)
from flowdopr.config.yaml12 import parse_yaml
from flowdopr.flow import build_objective, build_sampling
from flowdopr.models import build_model
from flowdopr.optim import build_optimizer, format_roles
from flowdopr.train.start import optimizer_arguments

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = list(shipped().values())
RECIPES = CONFIGS / "recipes"
SHAPES = {
    **dict.fromkeys(("mnist", "fashion_mnist"), (1, 28, 28)),
    "digits": (1, 8, 8),
    "latents": (4, 32, 32),  # of ImageNet at 256x256
    "zip": (3, 16, 16),  # of results/cifar16
}
CLASSES = {"latents": 1000}
SIZES = re.compile(r"(\d+(?:\.(\d+))?)M parameters")
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


def is_base_only(path: Path) -> bool:
    """Whether a file describes a data set alone, as a base for other configs."""
    return set(parse_yaml(path.read_text())) <= {"data", "evaluate"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_loads_and_builds(path):
    if is_base_only(path):
        extra = ["name=x", "model.name=dit", "train.steps=1", "train.global_batch_size=1"]
        load_config(path, extra)
        with pytest.raises(ConfigError, match="describes a data set alone; give a config that has"):
            load_config(path)
        return
    config = load_config(path)
    assert to_yaml(config)
    model = model_of(config)
    with torch.device("meta"):
        for chosen in (
            config,
            apply_overrides(config, ["optimizer=dopr-adamw", "train.ema_decays=[0.9]"]),
        ):
            optimizer = build_optimizer(model, **optimizer_arguments(chosen))
            assert format_roles(model, optimizer)
    build_objective(config)
    build_sampling(config)


@pytest.mark.parametrize(
    "path", [path for path in FILES if SIZES.search(path.read_text())], ids=lambda path: path.stem
)
def test_comments_give_the_number_of_parameters(path):
    said, decimals = SIZES.search(path.read_text()).groups(default="")
    count = sum(p.numel() for p in model_of(load_config(path)).parameters())
    assert f"{count / 1e6:.{len(decimals)}f}" == said


def test_a_file_of_a_data_set_alone_names_a_config_to_give():
    with pytest.raises(ConfigError, match=r"as its base, such as .*/mnist-unet\.yaml$"):
        load_config(RECIPES.parent / "mnist.yaml", ["name=x"])


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_has_the_size_of_its_source_and_a_version_with_dopr(name):
    config, with_dopr = (load_config(RECIPES / f"{name}{end}.yaml") for end in ("", "-dopr"))
    count = sum(p.numel() for p in model_of(config).parameters())
    assert count == pytest.approx(PARAMETERS[name], rel=0.005)
    plain, changed = (to_dict(item) for item in (config, with_dopr))
    dopr = changed["optimizer"]["dopr"]
    assert dopr == DoPrConfig().model_dump(mode="json")
    assert changed == plain | {
        "name": with_dopr.name,
        "optimizer": plain["optimizer"] | {"dopr": dopr},
    }
