"""Speed of loading images compared with torchvision's ImageFolder in torch's DataLoader.

    python scripts/benchmark_data.py [--root FOLDER] [--images N] [--format jpeg|png] [--json FILE]
                                     [--workers 0 1 2] [--rounds N] [--batches N] [--start N]

Both loaders shuffle, decode, mirror half of the images and end with float batches in [-1, 1] on
the CPU, and take turns. Ours reads the images from a folder, from a ZIP, from a tar, and from
memory (data.cache=memory); the peer reads them from the folder. Without --root, the script makes
images of 32x32 pixels in ten classes. A ratio is the median over rounds of our images a second
divided by the peer's; above 1 we are faster.

With --start N, it measures instead how long opening N tiny images takes, without and with an index
of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from flowdopr.config import Config, DataConfig, DiTConfig, TrainConfig
from flowdopr.data import build_image_datasets, build_loader
from flowdopr.disk import to_json
from flowdopr.runs import provenance

BATCH = 128


def write_images(folder: Path, number: int, kind: str) -> Path:
    """`number` images of coloured slopes with some noise, which compress like photographs."""
    noise = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 32)
    for i in range(number):
        slopes = noise.uniform(-120, 120, (2, 3))
        pixels = 128 + ramp[:, None, None] * slopes[0] + ramp[None, :, None] * slopes[1]
        pixels += noise.normal(0, 12, (32, 32, 3))
        path = folder / f"class{i % 10}" / f"{i:06d}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return folder


def packed(folder: Path, out: Path) -> dict[str, Path]:
    """The folder, and a ZIP and a tar of its files, by `data.name`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with zipfile.ZipFile(out / "images.zip", "w") as archive:
        for path in files:
            archive.write(path, path.relative_to(folder))
    with tarfile.open(out / "images.tar", "w", dereference=True) as archive:
        for path in files:
            archive.add(path, path.relative_to(folder))
    return {"folder": folder, "zip": out / "images.zip", "tar": out / "images.tar"}


def ours(name: str, root: Path, workers: int, cache: str = "none") -> Iterator[Tensor]:
    """Endless batches x_1 (BATCH, C, H, W)."""
    config = Config(
        name="benchmark",
        data=DataConfig(
            name=name, root=str(root), horizontal_flip=True, num_workers=workers, cache=cache
        ),
        model=DiTConfig(name="dit"),
        train=TrainConfig(steps=1, global_batch_size=BATCH),
    )
    train = build_image_datasets(config.data).train
    for batch in build_loader(config, train):
        yield batch.on("cpu")[0]


def peer(root: Path, workers: int) -> Iterator[Tensor]:
    """The same of torchvision."""
    steps = [transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    dataset = ImageFolder(root, transforms.Compose([*steps, transforms.Normalize(0.5, 0.5)]))
    loader = DataLoader(
        dataset,
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        for images, _ in loader:
            yield images


def speed(batches: Iterator[Tensor], workers: int, number: int) -> float:
    """Images a second over `number` batches, without those that lay ready."""
    for _ in range(2 * workers + 1):
        next(batches)
    start = time.perf_counter()
    for _ in range(number):
        assert next(batches).shape[0] == BATCH
    return number * BATCH / (time.perf_counter() - start)


def measure(
    sources: dict[str, Path], workers: int, rounds: int, number: int
) -> dict[str, dict[str, float]]:
    """The speed of each of our sources and of the peer, which take turns in changing order."""
    loaders = {name: ours(name, root, workers) for name, root in sources.items()}
    loaders |= {"cache": ours("folder", sources["folder"], workers, "memory")}
    loaders |= {"peer": peer(sources["folder"], workers)}
    shapes = {tuple(next(loader).shape) for loader in loaders.values()}
    assert len(shapes) == 1, shapes
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for i in range(rounds):
        names = list(loaders)
        for name in names if i % 2 else names[::-1]:
            speeds[name].append(speed(loaders[name], workers, number))
    results = {}
    for name, found in speeds.items():
        ratios = [a / b for a, b in zip(found, speeds["peer"], strict=True)]
        results[name] = {
            "images_per_second": statistics.median(found),
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
        }
    return results


def write_many(folder: Path, number: int) -> Path:
    """Links to one tiny image, a thousand in each class, as if written a minute ago."""
    first = write_images(folder, 1, "png") / "class0" / "000000.png"
    for i in range(1, number):
        path = folder / f"class{i // 1000}" / f"{i:06d}.png"
        path.parent.mkdir(exist_ok=True)
        if i % 1000 == 0:  # disks limit the links to one file
            first = Path(shutil.copy(first, path))
        else:
            path.hardlink_to(first)
    for path in (folder, *folder.iterdir()):
        os.utime(path, (time.time() - 60,) * 2)
    return folder


def measure_start(sources: dict[str, Path], rounds: int, cache: Path) -> dict[str, dict]:
    """Seconds and CPU seconds of opening each source, without an index and with it, in turn."""
    os.environ["FLOWDOPR_CACHE"] = str(cache)
    results = {}
    for name, root in sources.items():
        data, found = DataConfig(name=name, root=str(root)), {"without": [], "with": []}
        for _ in range(rounds):
            shutil.rmtree(cache, ignore_errors=True)
            for times in found.values():
                start = time.perf_counter(), time.process_time()
                build_image_datasets(data)
                times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        rows = {
            key: [statistics.median(column) for column in zip(*times, strict=True)]
            for key, times in found.items()
        }
        ratios = [a / b for (a, _), (b, _) in zip(*found.values(), strict=True)]
        spread = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        results[name] = rows | spread
        shown = {key: f"{wall:.2f} s ({cpu:.2f} s of CPU)" for key, (wall, cpu) in rows.items()}
        print(
            f"start, {name}: {shown['without']} without an index, {shown['with']} with it, ratio "
            f"{spread['ratio']:.1f} ({spread['low']:.1f} to {spread['high']:.1f})",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, help="a folder of one folder for each class")
    parser.add_argument("--images", type=int, default=20_000, help="how many to make")
    parser.add_argument("--format", choices=["jpeg", "png"], default="jpeg")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=40, help="in each round")
    parser.add_argument("--start", type=int, help="measure opening so many images instead")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, object] = {"machine": provenance(torch.device("cpu"))}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if arguments.start:
            sources = packed(write_many(out / "images", arguments.start), out)
            report["start"] = measure_start(sources, arguments.rounds, out / "cache")
            arguments.workers = []
        else:
            made = out / "images", arguments.images, arguments.format
            sources = packed(arguments.root or write_images(*made), out)
        for workers in arguments.workers:
            results = measure(sources, workers, arguments.rounds, arguments.batches)
            report[f"{workers} workers"] = results
            for name, found in results.items():
                print(
                    f"{workers} workers, {name}: {found['images_per_second']:,.0f} images/s, ratio "
                    f"{found['ratio']:.2f} ({found['ratio_low']:.2f} to {found['ratio_high']:.2f})",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(to_json(report))


if __name__ == "__main__":
    main()
