"""The description of a data set, and its two splits.

Shapes: `image_shape` is that of the model's input: pixels (C, H, W) or latents (L, h, w).
"""

from dataclasses import asdict, dataclass
from typing import Any

from flowdopr.data.memory import ImageDataset

MOST_NAMES = 6  # of classes on one line


@dataclass(frozen=True)
class DatasetInfo:
    """Properties of a data set that models and cards need.

    Attributes:
        image_shape: (C, H, W).
        num_classes: 0, with empty `class_names`, for images without classes.
        fingerprint: a sha256 that changes with any image, name, label, the split or the resizing;
            of a folder or shards of more than 1 GiB, only with names and file sizes.
        autoencoder: for latents, what decodes them: name, weights_sha256, scale, shift.
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


@dataclass(frozen=True)
class Datasets:
    """The two splits, not augmented: the loader mirrors images.

    `remarks` are for the log: what was left out, and where the labels come from.
    """

    train: ImageDataset
    held_out: ImageDataset
    info: DatasetInfo
    remarks: tuple[str, ...] = ()

    @property
    def reference(self) -> ImageDataset:
        """The images that generated ones are compared with: the training set."""
        return self.train

    def summary(self) -> str:
        """What was found, on one line."""
        info, names = self.info, list(self.info.class_names)
        shape = " x ".join(map(str, info.image_shape))
        if len(names) > MOST_NAMES:
            names[MOST_NAMES - 1 : -1] = ["..."]
        classes = f"{info.num_classes} classes ({', '.join(names)})" if names else "no classes"
        counts = f"{info.num_train:,} images to train on, {info.num_held_out:,} held out"
        return "; ".join([f"data: {info.name}, {counts}, {shape}, {classes}", *self.remarks])
