"""From the bytes of an image file to pixels.

Pillow decodes. Orientation is that of the EXIF tag; of several frames or pages the first counts;
what is transparent lies on white; of 16 bits the upper 8 count; CMYK and other colours become RGB
by Pillow's own conversion, without colour profiles. Images beyond Pillow's limit against
decompression bombs, 178,956,970 pixels, are refused before they are decoded.

Shapes: an image is uint8 RGB `(3, H, W)`.
"""

import io
import warnings
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from flowdopr.exits import reason

# Pillow recognises these, but cannot decode them, or only by running another program.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
COMMON = {"JPEG", "PNG", "WEBP"}
SIXTEEN_BITS = {"PNG", "PPM"}  # formats that Pillow may open with 16 bits in its 32-bit mode

# Pillow warns at half of the number of pixels that it refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@cache
def formats() -> tuple[str, ...]:
    """The formats that Pillow decodes, by its own names, in the order in which they are tried."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - NOT_DECODED, key=lambda name: (name not in COMMON, name)))


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of files in these formats, such as `.png`."""
    known = {*formats(), "MPO"}  # which Pillow opens as a JPEG
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in known)


def decode(content: bytes) -> Tensor:
    """uint8 RGB `(3, H, W)`, upright.

    Raises:
        ValueError: Pillow cannot decode it, or its pixels have no known range. Not the whole line
            that a user sees.
        MemoryError: there is too little memory for it.
    """
    try:
        with Image.open(io.BytesIO(content), formats=formats()) as image:
            sixteen = image.mode.startswith("I;16") or (
                image.mode == "I" and image.format in SIXTEEN_BITS
            )
            ImageOps.exif_transpose(image, in_place=True)
            pixels = np.array(_eight_bits(image, sixteen=sixteen))
            return torch.from_numpy(pixels).permute(2, 0, 1)
    except UnidentifiedImageError:
        raise ValueError("no image format that Pillow decodes") from None
    except Exception as error:  # decoders fail in many ways
        raise ValueError(reason(error)) from None


def _eight_bits(image: Image.Image, *, sixteen: bool) -> Image.Image:
    """The image as opaque 8-bit RGB."""
    if sixteen:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{image.mode} pixels have no known range, expected 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
