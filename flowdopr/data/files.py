"""Some images of a folder or archive, decoded on access and brought to one shape.

Shapes: an image is uint8 `(C, H, W)`, a label an int (0 where there are no classes).
"""

from collections.abc import Callable

from torch import Tensor

from flowdopr.data.memory import ImageDataset
from flowdopr.data.pixels import decode
from flowdopr.data.sources import Source, shown


class BadImage(ValueError):
    """An image that cannot be decoded. `reason` is the part of the message that says why."""

    def __init__(self, message: str, reason: str = ""):  # unpickled by the message alone
        super().__init__(message)
        self.reason = reason


def load(source: Source, name: str) -> Tensor:
    """uint8 RGB `(3, H, W)`, upright.

    Raises:
        BadImage: the file's bytes are no image that can be decoded.
        ValueError: the file cannot be read at all.
    """
    try:
        return decode(source.read(name))
    except OSError as error:  # of the disk, as all that `decode` raises is a ValueError
        raise ValueError(
            f"{source.setting}: cannot read the image '{source.where(name)}' "
            f"({error.strerror or shown(error)}); put it back or make it readable"
        ) from None
    except Exception as error:  # archives fail in many ways
        reason = shown(error)
        raise BadImage(
            f"{source.setting}: cannot read the image '{source.where(name)}' ({reason}); repair or "
            "remove it, or set data.on_bad_image=skip (flowdopr check lists all such images); a "
            "run that has begun then goes on by --resume --changed-data",
            reason,
        ) from None


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
        name = self.source.names[int(self.indices[index])]
        image = self.transform(load(self.source, name))
        if tuple(image.shape) != self.image_shape:
            (_, h, w), (_, height, width) = image.shape, self.image_shape
            raise ValueError(
                f"{self.source.setting}: '{self.source.where(name)}' has {w}x{h} pixels, the "
                f"others {width}x{height}; set data.image_size to bring all to one size"
            )
        return image, int(self.labels[index])
