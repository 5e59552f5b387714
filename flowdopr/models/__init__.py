"""Models of the velocity: `model(x, t, y) -> (B, C, H, W)`.

Each knows its `image_shape` (C, H, W) and `num_classes`; the label `num_classes` is the null label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from flowdopr.config.errors import ConfigError
from flowdopr.config.own import call_own, explained
from flowdopr.models.dit import DiT
from flowdopr.models.pc import add_pc_layers, merge_pc_layers, pc_layers, update_spectral_norms
from flowdopr.models.unet import UNet

if TYPE_CHECKING:
    from flowdopr.config import Config
    from flowdopr.config.model import OwnConfig

__all__ = [
    "MODELS",
    "DiT",
    "UNet",
    "add_pc_layers",
    "build_model",
    "merge_pc_layers",
    "pc_layers",
    "update_spectral_norms",
]

MODELS = {"dit": DiT, "unet": UNet}


def build_model(config: Config, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The model of `config.model`; its fields are the keyword arguments of the model, and those of
    `config.model.pc` of `add_pc_layers`.

    Raises:
        ValueError: settings that do not fit the images or one another.
        ConfigError: a model of the user's own that is not allowed, or is none.
    """
    num_classes = num_classes if config.model.class_conditional else 0
    if config.model.name == "own":
        model = _own_model(config.model, image_shape, num_classes)
    else:
        options = config.model.model_dump(exclude={"name", "class_conditional", "pc"})
        model = MODELS[config.model.name](image_shape, num_classes, **options)
    pc = config.model.pc
    return model if pc is None else add_pc_layers(model, **pc.model_dump())


def _own_model(
    settings: OwnConfig, image_shape: tuple[int, int, int], num_classes: int
) -> nn.Module:
    """The model that the user's function returns, after it was called once.

    Raises:
        ConfigError: as `call_own`, or it is no model of such images and classes.
    """
    facts = {"image_shape": image_shape, "num_classes": num_classes}
    model, place = call_own("model", settings, **facts), f"model.factory: {settings.factory}"
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{place} returns a {type(model).__name__}; let it return an nn.Module")
    for name, value in facts.items():
        if not hasattr(model, name):
            setattr(model, name, value)
        elif (found := getattr(model, name)) != value:
            raise ConfigError(f"{place}: its model has {name} {found}; the data have {value}")
    x, t = torch.zeros(2, *image_shape), torch.full((2,), 0.5)
    y = torch.tensor([0, num_classes]) if num_classes else None
    remedy = f"it must take x (B, C, H, W), t (B,) and y (B,), 0 to {num_classes} or None"
    with explained(f"{place}: its model(x, t, y) fails", remedy), torch.no_grad():
        out = model.eval()(x, t, y)
    if (shape := getattr(out, "shape", None)) != x.shape:
        raise ConfigError(f"{place}: its model maps {tuple(x.shape)} to {shape}; keep the shape")
    return model.train()
