"""Images in and batches out: data sets, their fingerprint, the resumable loader, the uint8 rule."""

from flowdopr.data.check import check_all, check_start
from flowdopr.data.datasets import SOURCES, build_image_datasets, open_sources
from flowdopr.data.info import DatasetInfo, Datasets
from flowdopr.data.loader import build_loader, plain_batches
from flowdopr.data.memory import Batch, ImageDataset, ImageTensor
from flowdopr.data.transforms import UINT8_RULE, from_uint8, to_float, to_uint8

__all__ = [
    "SOURCES",
    "UINT8_RULE",
    "Batch",
    "DatasetInfo",
    "Datasets",
    "ImageDataset",
    "ImageTensor",
    "build_image_datasets",
    "build_loader",
    "check_all",
    "check_start",
    "from_uint8",
    "open_sources",
    "plain_batches",
    "to_float",
    "to_uint8",
]
