"""Write crops of scikit-learn's two photographs: the folder of images that the gallery trains on.

python sample/crops.py data/photos writes data/photos/flower/0000.png, ... and so for temple
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

CROPS, SIDE = 2000, 64  # of each photograph; pixels


def main(folder: Path) -> None:
    """Write the crops, the same in every run, into a folder for each photograph."""
    numbers = np.random.default_rng(0)
    for name, photograph in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(CROPS):
            top, left = (int(numbers.integers(0, side - SIDE)) for side in photograph.shape[:2])
            crop = photograph[top : top + SIDE, left : left + SIDE]
            Image.fromarray(crop).save(folder / name / f"{number:04d}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
