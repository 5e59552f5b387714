"""Latents: the autoencoder, encoding a data set once, and reading the encoded data set.

`build_datasets` opens any data set, of latents or of pixels; `check` reads all its files.
"""

from flowdopr.latents.autoencoder import Autoencoder, load_decoder
from flowdopr.latents.cached import build_datasets, build_pixel_datasets
from flowdopr.latents.check import check
from flowdopr.latents.encode import encode

__all__ = [
    "Autoencoder",
    "build_datasets",
    "build_pixel_datasets",
    "check",
    "encode",
    "load_decoder",
]
