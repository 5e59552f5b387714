"""Some images of a folder or archive, decoded on access and brought to one shape.

Shapes: an image is uint8 `(C, H, W)`, a label an int (0 where there are no classes).
"""

from collections.abc import Callable

from torch import Tensor

from flowdopr.data.memory import ImageDataset
from flowdopr.data.pixels import decode
from flowdopr.data.sources import Source, why
from flowdopr.exits import is_out_of_memory

BAD_IMAGE_REMEDY = (
    "repair or remove it, or set data.on_bad_image=skip (flowdopr check lists all such images); a "
    "run that has begun then goes on by --resume --changed-data"
)


class BadImage(ValueError):
    """An image that cannot be used.

    Attributes:
        reason: the part of the message that says why.
        decoding: whether its bytes are wrong; else they could not be read, which may pass.
    """

    reason, decoding = "", True  # unpickling, which knows the message alone, restores them after

    @classmethod
    def of(cls, source: Source, name: str, error: Exception) -> "BadImage":
        short = is_out_of_memory(error)
        failed = short or isinstance(error, OSError)  # `decode` raises a ValueError for wrong bytes
        reason = "out of memory" if short else getattr(error, "strerror", None) or why(error)
        remedy = "put it back or make it readable" if failed else BAD_IMAGE_REMEDY
        remedy = "free memory, or remove it" if short else remedy
        place = f"{source.setting}: cannot read the image '{source.where(name)}'"
        bad = cls(f"{place} ({reason}); {remedy}")
        bad.reason, bad.decoding = reason, not failed
        return bad


def load(source: Source, number: int) -> Tensor:
    """The image `source.names[number]` as uint8 RGB `(3, H, W)`, upright.

    Raises:
        BadImage: it cannot be read or decoded.
    """
    try:
        return decode(source.read(number))
    except Exception as error:  # archives fail in many ways
        raise BadImage.of(source, source.names[number], error) from None


class ImageFiles(ImageDataset):
    """Some images of a folder or archive, all transformed to one shape."""

    def __init__(
        self,
        source: Source,
        indices: Tensor,
        labels: Tensor,
        transform: Callable[[Tensor], Tensor],
        image_shape: tuple[int, int, int],
    ):
        self.source, self.indices, self.labels = source, indices, labels
        self.transform, self.image_shape = transform, image_shape

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        number = int(self.indices[index])
        image = self.transform(load(self.source, number))
        if tuple(image.shape) != self.image_shape:
            (_, h, w), (_, height, width) = image.shape, self.image_shape
            place = self.source.where(self.source.names[number])
            raise ValueError(
                f"{self.source.setting}: '{place}' has {w}x{h} pixels, the "
                f"others {width}x{height}; set data.image_size to bring all to one size"
            )
        return image, int(self.labels[index])
