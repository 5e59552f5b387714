"""Images in and batches out: data sets, their fingerprint, the resumable loader, the uint8 rule."""

from flowdopr.data.datasets import DatasetInfo, Datasets, build_datasets
from flowdopr.data.loader import build_loader, plain_batches
from flowdopr.data.memory import ImageDataset, ImageTensor
from flowdopr.data.transforms import UINT8_RULE, from_uint8, to_uint8

__all__ = [
    "UINT8_RULE",
    "DatasetInfo",
    "Datasets",
    "ImageDataset",
    "ImageTensor",
    "build_datasets",
    "build_loader",
    "from_uint8",
    "plain_batches",
    "to_uint8",
]
