"""Conversions between stored images and the model's input.

Shapes: `(..., C, H, W)`; C 1 (grey) or 3 (RGB). Stored images are uint8 0..255, the model's are
float32 in [-1, 1]. Everything that writes or scores images goes through `to_uint8`, so that there
is one rounding rule in the project.
"""

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

UINT8_RULE = "((x + 1) * 127.5).round().clamp(0, 255)"


def to_uint8(images: Tensor) -> Tensor:
    """Float images `(..., C, H, W)`, nominally in [-1, 1] -> uint8: round, then clamp."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images `(..., C, H, W)` -> float32 in [-1, 1]; `to_uint8` undoes it exactly."""
    return images.float() / 127.5 - 1


def to_float(images: Tensor) -> Tensor:
    """The model's input: uint8 images scaled to [-1, 1]; floats, such as latents, unchanged."""
    return images if images.is_floating_point() else from_uint8(images)


class AdmCrop(nn.Module):
    """The centre square of an image at `size` pixels as ADM prepares ImageNet, and after it DiT and
    SiT: the shorter side is halved by the box filter while it is twice too long or longer, then
    brought to `size` by bicubic interpolation (arXiv 2105.05233, `image_datasets.py`).

    uint8 `(C, H, W)`, C 1 or 3, one image at a time -> `(C, size, size)`.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        picture = v2.functional.to_pil_image(image)
        while min(picture.size) >= 2 * self.size:
            half = (picture.width // 2, picture.height // 2)
            picture = picture.resize(half, Image.Resampling.BOX)
        scale = self.size / min(picture.size)
        sides = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(sides, Image.Resampling.BICUBIC)
        left, top = ((side - self.size) // 2 for side in sides)
        picture = picture.crop((left, top, left + self.size, top + self.size))
        return v2.functional.pil_to_tensor(picture)


class Fit:
    """uint8 `(..., C, H, W)` of any size -> `(..., channels, image_size, image_size)`.

    The shorter side is resized (smaller images are enlarged), the rest is cropped about the centre.
    `resize` is "bilinear", antialiased, or "adm". `image_size` None leaves the size alone. What
    fits is returned at once: torchvision's transforms would take a third of a small image's time.
    """

    def __init__(self, image_size: int | None, channels: int, resize: str = "bilinear"):
        self.size, self.channels = image_size, channels
        self.colour = v2.Grayscale(1) if channels == 1 else v2.RGB()
        self.crop: nn.Module = nn.Identity()
        if image_size is not None and resize == "adm":
            self.crop = AdmCrop(image_size)
        elif image_size is not None:
            self.crop = v2.Compose(
                [v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)]
            )

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[-3] != self.channels:
            images = self.colour(images)
        return images if images.shape[-2:] == (self.size, self.size) else self.crop(images)


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Flip the images `(B, C, H, W)` where `chosen` (B,) is True, left to right."""
    flipped = v2.functional.horizontal_flip(images)
    return torch.where(chosen[:, None, None, None], flipped, images)
