r"""CIFAR-10 as two ZIP archives, PREFIX-train.zip and PREFIX-test.zip, of all or some classes.

    python scripts/cifar10_zips.py data/cifar10-16 --side 16
    python scripts/cifar10_zips.py data/search-16 --side 16 \
      --classes airplane automobile bird cat deer

The images come from torchvision, which downloads them into `--root`, or with `--archives` from two
archives with a folder for each class. They are written as PNGs, with `--side` smaller than 32 as
averages of square blocks of pixels.
"""

import argparse
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from torchvision.datasets import CIFAR10

SPLITS = ("train", "test")


def from_torchvision(root: Path, split: str) -> Iterator[tuple[str, Image.Image]]:
    """(class, image) of every image."""
    images = CIFAR10(str(root), train=split == "train", download=True)
    for image, label in images:
        yield images.classes[label], image


def from_archive(path: Path) -> Iterator[tuple[str, Image.Image]]:
    """(class, image) of every image."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if not name.endswith("/"):
                yield name.split("/")[-2], Image.open(io.BytesIO(archive.read(name)))


def png(image: Image.Image, side: int) -> bytes:
    """The content of a PNG file of the image, averaged to side x side pixels."""
    file = io.BytesIO()
    image.resize((side, side), Image.Resampling.BOX).save(file, "png")
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("prefix", type=Path, help="the archives' path without -train.zip and -test.zip")
    add("--classes", nargs="+", help="names of classes; default: all ten")
    add("--side", type=int, choices=(4, 8, 16, 32), default=32, help="side in pixels")
    add("--root", type=Path, default=Path("data"), help="torchvision's folder")
    add("--archives", type=Path, nargs=2, help="archives of train and test images to take")
    options = parser.parse_args()
    options.prefix.parent.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(SPLITS):
        if options.archives:
            images = from_archive(options.archives[number])
        else:
            images = from_torchvision(options.root, split)
        path, count = Path(f"{options.prefix}-{split}.zip"), 0
        with zipfile.ZipFile(path, "w") as archive:
            for of_class, image in images:
                if options.classes is None or of_class in options.classes:
                    archive.writestr(f"{of_class}/{count:05d}.png", png(image, options.side))
                    count += 1
        print(f"{path}: {count:,} images")


if __name__ == "__main__":
    main()
