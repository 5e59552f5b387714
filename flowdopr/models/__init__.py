"""Models of the velocity: `model(x, t, y) -> (B, C, H, W)`.

Each knows its `image_shape` (C, H, W) and `num_classes`; the label `num_classes` is the null label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from flowdopr.models.dit import DiT
from flowdopr.models.unet import UNet

if TYPE_CHECKING:
    from flowdopr.config import Config

__all__ = ["MODELS", "DiT", "UNet", "build_model"]

MODELS = {"dit": DiT, "unet": UNet}


def build_model(config: Config, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The model of `config.model`; its fields are the model's keyword arguments.

    Raises:
        ValueError: settings that do not fit the images or one another.
    """
    options = config.model.model_dump(exclude={"name", "class_conditional"})
    num_classes = num_classes if config.model.class_conditional else 0
    return MODELS[config.model.name](image_shape, num_classes, **options)
