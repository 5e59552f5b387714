"""Images in and batches out: data sets, their fingerprint, the resumable loader, the uint8 rule."""

from flowdopr.data.datasets import build_datasets, build_pixel_datasets
from flowdopr.data.info import DatasetInfo, Datasets
from flowdopr.data.latents import open_latents
from flowdopr.data.loader import build_loader, plain_batches
from flowdopr.data.memory import ImageDataset, ImageTensor
from flowdopr.data.transforms import UINT8_RULE, from_uint8, to_float, to_uint8

__all__ = [
    "UINT8_RULE",
    "DatasetInfo",
    "Datasets",
    "ImageDataset",
    "ImageTensor",
    "build_datasets",
    "build_loader",
    "build_pixel_datasets",
    "from_uint8",
    "open_latents",
    "plain_batches",
    "to_float",
    "to_uint8",
]
