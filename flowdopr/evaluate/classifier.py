"""A small classifier of the data set itself, whose features stand in for Inception's.

Inception was trained on photographs. On digits, or without Inception's weights, the features of a
network trained on the data set itself judge better and cost a minute. This classifier is trained
once for each data set, always on one CPU thread and from one seed, and cached under the data set's
fingerprint. A Frechet distance between its features is an FD; it can be compared only with an FD
whose card names the same weights.

Shapes: images uint8 `(B, C, H, W)`, features `(B, 64)`, logits `(B, num_classes)`.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from flowdopr.data import Datasets, ImageDataset, from_uint8
from flowdopr.data.loader import picks_between
from flowdopr.disk import cache_folder, file_sha256, replacing_shared, write_tensors
from flowdopr.terminal import counting

RECIPE = 3  # part of the cache key: raise it with any change of the network or its training
NUM_FEATURES = 64
LARGEST_SIDE = 32  # larger images are averaged down to it
STEPS, BATCH_SIZE, PEAK_LR = 400, 128, 5e-3
MAX_HELD_OUT = 10_000
TOGETHER = 500  # images in one call when nothing is trained


class Classifier(nn.Module):
    """Four convolutions and two linear layers: uint8 images -> features and logits."""

    scale: Tensor

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        channels, height, width = image_shape
        self.image_shape, self.num_classes = image_shape, num_classes
        self.size = (min(height, LARGEST_SIDE), min(width, LARGEST_SIDE))
        halvings = 3 if min(self.size) >= 16 else 1
        widths = [channels, 32, 48, 64, 96]
        blocks: list[nn.Module] = []
        for number, (c_in, c_out) in enumerate(pairwise(widths)):
            stride = 2 if 1 <= number <= halvings else 1
            blocks += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)]
            blocks += [nn.ReLU()]
        self.body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.features = nn.Linear(4 * widths[-1], NUM_FEATURES)
        # Set after training so that features have mean square 1, as KID's kernel (1 + a.b / D)^3
        # assumes; it also gives distances a readable size.
        self.register_buffer("scale", torch.ones(()))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(NUM_FEATURES, num_classes))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 `(B, C, H, W)` -> features `(B, 64)`, logits `(B, num_classes)`."""
        x = F.adaptive_avg_pool2d(from_uint8(images), self.size)
        features = self.features(self.body(x))
        return features / self.scale, self.head(features)


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier on disk: the path of its weights and their hash, its accuracy on held-out
    images, and that of a guess, the share of the most frequent class among them."""

    path: Path
    weights_sha256: str
    held_out_accuracy: float
    chance: float
    warning: str | None
    """What is wrong with its features, in one line; None if nothing is."""


def trained_classifier(datasets: Datasets) -> TrainedClassifier:
    """The classifier of this data set, from the cache or trained now.

    Two processes may train it at once: both write the same file, each atomically.

    Raises:
        ValueError: the data set has no classes.
    """
    info = datasets.info
    if info.num_classes < 2:
        raise ValueError(
            f"evaluate.extractor: the data set '{info.name}' has no classes to train a classifier "
            "on; use evaluate.extractor=imagenet or evaluate.extractor=inception"
        )
    path = cache_folder() / f"classifier-{info.fingerprint[:24]}-r{RECIPE}.safetensors"
    try:
        right = load_classifier(path)[1]
    except (OSError, ValueError):  # not there, or damaged
        with _same_everywhere():
            model = train_classifier(Classifier(info.image_shape, info.num_classes), datasets.train)
        right = accuracy(model, datasets.held_out)
        _save(path, model, right)
    labels = datasets.held_out.labels[_evenly_spaced(len(datasets.held_out), MAX_HELD_OUT)]
    chance = labels.bincount().max().item() / len(labels)
    warning = None
    if right <= chance + 2 * math.sqrt(chance * (1 - chance) / len(labels)):
        warning = (
            f"the classifier of {info.name} is right on {100 * right:.1f} % of the held-out "
            f"images, no better than a guess ({100 * chance:.1f} %): distances in its features "
            "say little; use evaluate.extractor=inception"
        )
    return TrainedClassifier(path, file_sha256(path), right, chance, warning)


def load_classifier(path: str | Path) -> tuple[Classifier, float]:
    """A classifier written by `trained_classifier`, on the CPU, in evaluation mode, and its
    accuracy on held-out images.

    Raises:
        ValueError, OSError: there is none, or the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads(file.metadata()["flowdopr"])
        model = Classifier(tuple(notes["image_shape"]), notes["num_classes"])
        model.load_state_dict(load_file(path))
        right = float(notes["held_out_accuracy"])
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a classifier: {error}") from None
    return model.eval().requires_grad_(False), right


def train_classifier(model: Classifier, dataset: ImageDataset, steps: int = STEPS) -> Classifier:
    """A fixed number of AdamW steps on the CPU, under a one-cycle learning rate."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    with counting("training the classifier", steps) as progress:
        for step in range(steps):
            picks = picks_between(0, len(dataset), step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
            images, labels = dataset.batch(picks.indices)
            loss = F.cross_entropy(model(images)[1], labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress()
    model.eval()
    with torch.no_grad():
        images, _ = dataset.batch(_evenly_spaced(len(dataset), 1000))
        model.scale.copy_(model(images)[0].square().mean().sqrt())
    return model


def _evenly_spaced(total: int, at_most: int) -> Tensor:
    """At most `at_most` indices, evenly spaced because images may be sorted by class."""
    chosen = min(total, at_most)
    return torch.arange(chosen) * total // max(1, chosen)


@torch.no_grad()
def accuracy(model: Classifier, dataset: ImageDataset) -> float:
    """Fraction of at most 10,000 images that are classified as their label."""
    indices, right = _evenly_spaced(len(dataset), MAX_HELD_OUT), 0
    for part in indices.split(TOGETHER):
        images, labels = dataset.batch(part)
        right += int((model(images)[1].argmax(1) == labels).sum())
    return right / len(indices)


@contextmanager
def _same_everywhere() -> Iterator[None]:
    """One seed and one thread: sums split over threads would round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


def _save(path: Path, model: Classifier, held_out_accuracy: float) -> None:
    notes = {
        "image_shape": model.image_shape,
        "num_classes": model.num_classes,
        "held_out_accuracy": held_out_accuracy,
    }
    with replacing_shared(path) as part:
        write_tensors(part, model.state_dict(), {"flowdopr": json.dumps(notes)})
