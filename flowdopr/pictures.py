"""Many images in one picture. Shapes: images uint8 `(N, C, H, W)`."""

import math

from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import make_grid

SMALLEST_IN_GRID = 32  # pixels; smaller images are magnified


def grid(images: Tensor, columns: int | None = None, smallest: int = SMALLEST_IN_GRID) -> Tensor:
    """The images beside each other, uint8 (3, H', W').

    Args:
        columns: None: as many as there are rows.
        smallest: side in pixels below which images are magnified, without smoothing.
    """
    factor = math.ceil(smallest / min(images.shape[-2:]))
    if factor > 1:
        images = interpolate(images, scale_factor=factor, mode="nearest")
    columns = columns or math.ceil(math.sqrt(len(images)))
    return make_grid(images, nrow=columns, pad_value=255)
