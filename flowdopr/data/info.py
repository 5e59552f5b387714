"""What is known of a data set, and its two splits.

Shapes: `image_shape` is (C, H, W) of what a model sees: pixels, or latents (L, h, w).
"""

from dataclasses import asdict, dataclass
from typing import Any

from flowdopr.data.memory import ImageDataset


@dataclass(frozen=True)
class DatasetInfo:
    """What a model and a card must know of a data set.

    `image_shape` is (C, H, W). `num_classes` 0 and no `class_names`: images without classes.
    `fingerprint` is a sha256 that changes when any image, name, label, the split or the resizing
    does (a folder of more than 1 GiB: when a name or a file's size does). `autoencoder`, of latents
    alone, says what decodes them: name, weights_sha256, scale, shift.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    num_train: int
    num_held_out: int
    fingerprint: str
    autoencoder: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, ready for JSON."""
        lists = {"image_shape": list(self.image_shape), "class_names": list(self.class_names)}
        return asdict(self) | lists

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DatasetInfo":
        tuples: dict[str, Any] = {k: tuple(values[k]) for k in ("image_shape", "class_names")}
        return cls(**(values | tuples))


@dataclass(frozen=True)
class Datasets:
    """The two splits, neither ever augmented: mirroring is the loader's."""

    train: ImageDataset
    held_out: ImageDataset
    info: DatasetInfo

    @property
    def reference(self) -> ImageDataset:
        """What generated images are compared with: the plain training set."""
        return self.train
