"""Files of data sets with changed, cut or inserted bytes are read, or refused in one line."""

import io
import json
import zipfile

import numpy as np
import pytest
from damage import FEW, damage, read_or_refused
from hypothesis import given
from PIL import Image
from test_data_sets import write_mnist

from flowdopr.data import check_start
from flowdopr.data.pixels import decode
from flowdopr.latents import build_datasets


def read_all(config):
    data = build_datasets(config)
    check_start(data)
    for part in (data.train, data.held_out):
        for index in range(len(part)):
            part[index]


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA", "JPEG2000", "ICO"]
)
@FEW
@given(damaged=damage())
def test_images(kind, damaged):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    read_or_refused(lambda: decode(damaged(out.getvalue())))


@FEW
@given(damaged=damage())
def test_archives(damaged, make_config, tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for name in ("a/0.ppm", "a/1.ppm", "b/0.ppm", "b/1.ppm"):
            out.writestr(name, b"P6 2 2 255 " + bytes(12))
    archive.write_bytes(damaged(archive.read_bytes()))
    read_or_refused(lambda: read_all(make_config(name="zip", root=str(archive))))


@FEW
@given(damaged=damage())
def test_lists_of_labels(damaged, make_config, write_images, tmp_path):
    write_images(tmp_path, {"": 4})
    labels = {"labels": [[f"{number}.png", number % 2] for number in range(4)]}
    (tmp_path / "dataset.json").write_bytes(damaged(json.dumps(labels).encode()))
    read_or_refused(lambda: read_all(make_config(name="folder", root=str(tmp_path))))


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@FEW
@given(damaged=damage())
def test_mnist(file, damaged, make_config, tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / file
    path.write_bytes(damaged(path.read_bytes()))
    read_or_refused(lambda: read_all(make_config(name="mnist", root=str(tmp_path))))
