"""Models of the velocity: `model(x, t, y) -> (B, C, H, W)`.

Each knows its `image_shape` (C, H, W) and `num_classes`; the label `num_classes` is the null label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from flowdopr.models.dit import DiT
from flowdopr.models.pc import add_pc_layers, merge_pc_layers, pc_layers, update_spectral_norms
from flowdopr.models.unet import UNet

if TYPE_CHECKING:
    from flowdopr.config import Config

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
    """
    options = config.model.model_dump(exclude={"name", "class_conditional", "pc"})
    num_classes = num_classes if config.model.class_conditional else 0
    model = MODELS[config.model.name](image_shape, num_classes, **options)
    pc = config.model.pc
    return model if pc is None else add_pc_layers(model, **pc.model_dump())
