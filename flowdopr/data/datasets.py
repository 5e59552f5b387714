"""From `config.data` to a training set and a held-out set.

Shapes: images uint8 `(N, C, H, W)`, labels int64 `(N,)` in [0, num_classes); all 0 where the data
set has no classes. Where a data set brings a test split, that is the held-out set. Otherwise a
fixed share of each class is held out, the same one for every seed and on every machine.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor

from flowdopr.config import DataConfig
from flowdopr.config.own import call_own, explained
from flowdopr.data.archives import Archive, Shards
from flowdopr.data.check import broken_images
from flowdopr.data.files import ImageFiles, load
from flowdopr.data.info import DatasetInfo, Datasets
from flowdopr.data.labels import Classes, find_classes
from flowdopr.data.listing import LABEL_FILE
from flowdopr.data.memory import ImageTensor
from flowdopr.data.sources import Folder, Source, fingerprint_files, shown, why
from flowdopr.data.transforms import Fit

TORCHVISION = {
    "mnist": torchvision.datasets.MNIST,
    "fashion_mnist": torchvision.datasets.FashionMNIST,
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
}
SOURCES: dict[str, type[Folder | Archive | Shards]] = {
    "folder": Folder,
    "zip": Archive,
    "tar": Shards,
}


def build_image_datasets(data: DataConfig) -> Datasets:
    """The images that `data` names; latents are `latents.build_datasets`'s.

    With several processes on a machine, call it on one of them first if it may download.

    Raises:
        ValueError: nothing at `data.root`, no images, unreadable ones, too few of a class, a
            download that failed; one line each, with the remedy.
    """
    if data.name == "digits":
        return _in_memory(data, *_load_digits(data.held_out_fraction))
    if data.name == "own":
        return _in_memory(data, *_load_own(data))
    if data.name in TORCHVISION:
        return _in_memory(data, *_load_torchvision(data))
    sources = open_sources(data)
    if data.on_bad_image == "skip":
        for source in sources:
            source.leave_out(broken_images(source))
    return _from_two(data, *sources) if len(sources) == 2 else _from_files(data, *sources)


def open_sources(data: DataConfig, *, afresh: bool = False) -> list[Source]:
    """The folders or archives that `data` names: `root`, and `held_out_root` if there is one.

    `afresh`: list their files even if there is an index.

    Raises:
        ValueError: see `Folder`, `Archive` and `Shards`.
    """
    kind = SOURCES[data.name]
    others = [data.held_out_root] if data.held_out_root is not None else []
    held_out = (kind(root, "data.held_out_root", afresh=afresh) for root in others)
    return [kind(data.root, afresh=afresh), *held_out]


def split(labels: Tensor, held_out_fraction: float, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Sorted indices of the training and the held-out images, stratified by class.

    The permutation is fixed: NumPy guarantees that RandomState's stream never changes. Each class
    gives `held_out_fraction` of its images, at least one and never all.
    """
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    found, counts = labels.unique(return_counts=True)
    by_class = order[labels[order].argsort(stable=True)].split(counts.tolist())
    for label, members in zip(found.tolist(), by_class, strict=True):
        if len(members) < 2:
            which = f"class '{names[label]}' has" if names else "the data set has"
            raise ValueError(
                f"data.root: {which} {len(members)} image; at least 2 are needed, one to train on "
                "and one to hold out"
            )
        count = min(max(round(held_out_fraction * len(members)), 1), len(members) - 1)
        held_out[members[:count]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def _in_memory(
    data: DataConfig, train: ImageTensor, held_out: ImageTensor, names: Sequence[str]
) -> Datasets:
    """Resize both splits once and fingerprint the results."""
    transform = Fit(data.image_size, data.channels or train.images.shape[1])
    digest = hashlib.sha256(data.name.encode())
    fitted = []
    for part in (train, held_out):
        images = torch.cat([transform(chunk) for chunk in part.images.split(4096)])
        digest.update(repr(tuple(images.shape)).encode())
        digest.update(images.contiguous().numpy().data)
        digest.update(part.labels.numpy().data)
        fitted.append(ImageTensor(images, part.labels))
    channels, height, width = fitted[0].images.shape[1:]
    info = DatasetInfo(
        name=data.factory or data.name,
        image_shape=(channels, height, width),
        num_classes=len(names),
        class_names=tuple(names),
        num_train=len(train),
        num_held_out=len(held_out),
        fingerprint=digest.hexdigest(),
    )
    return Datasets(fitted[0], fitted[1], info)


def _load_digits(held_out_fraction: float) -> tuple[ImageTensor, ImageTensor, Sequence[str]]:
    pixels, target = load_digits(return_X_y=True)  # (N, 64) in 0..16
    images = torch.from_numpy(pixels * 255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    labels = torch.from_numpy(target).long()
    names = [str(digit) for digit in range(10)]
    train, held_out = (
        ImageTensor(images[part], labels[part]) for part in split(labels, held_out_fraction, names)
    )
    return train, held_out, names


def _load_own(data: DataConfig) -> tuple[ImageTensor, ImageTensor, Sequence[str]]:
    """What the user's function returns: ((images, labels), (held-out images, their labels)).

    Raises:
        ConfigError: as `call_own`, or it returns something else.
    """
    what = "must return ((images, labels), (held-out images, their labels))"
    found = call_own("data", data)
    with explained(f"data.factory: {data.factory} {what}", "docs/data.md has an example"):
        (images, labels), (others, their_labels) = found
        if (labels is None) != (their_labels is None):
            raise ValueError("one of the two has no labels")
        train, held_out = _to_own_part(images, labels), _to_own_part(others, their_labels)
        if train.images.shape[1:] != held_out.images.shape[1:]:
            raise ValueError("the two have images of different shapes")
    last = -1 if labels is None else int(max(part.labels.max() for part in (train, held_out)))
    return train, held_out, [str(label) for label in range(last + 1)]


def _to_own_part(images: Any, labels: Any) -> ImageTensor:
    """Tensors or arrays of the user's as a split.

    Raises:
        ValueError: they are of other types or shapes.
    """
    images = torch.as_tensor(images)
    labels = torch.zeros(len(images)) if labels is None else torch.as_tensor(labels)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        found = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images are {found} in place of uint8 (N, 1 or 3, H, W)")
    if not images.numel() or labels.shape != images.shape[:1]:
        raise ValueError(f"{tuple(labels.shape)} labels of {tuple(images.shape)} images")
    if labels.min() < 0 or not torch.equal(labels, labels.long()):
        raise ValueError("labels are whole numbers from 0")
    return ImageTensor(images, labels.long())


def _load_torchvision(data: DataConfig) -> tuple[ImageTensor, ImageTensor, Sequence[str]]:
    train, held_out = (_open_torchvision(data, train=train) for train in (True, False))
    try:
        return _to_tensors(train), _to_tensors(held_out), train.classes
    except Exception as error:
        raise _damaged(data, error) from None


def _open_torchvision(data: DataConfig, *, train: bool):
    """The data set if it is in `root`, else downloaded if that is allowed and works."""
    reader = TORCHVISION[data.name]
    with warnings.catch_warnings():
        # CIFAR's pickles are older than NumPy 2's way of naming a dtype.
        warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
        try:
            return reader(data.root, train=train, download=False)
        except Exception as error:  # torchvision checks little of what it reads
            if "not found" not in str(error):
                raise _damaged(data, error) from None
        if not data.download:
            raise ValueError(
                f"data.root: {data.name} is not in '{shown(data.root)}' and data.download is "
                f"false; put {_archives(data)}, and set data.download=true: what is there is not "
                "downloaded"
            )
        try:
            return reader(data.root, train=train, download=True)
        except Exception as error:  # of the network, of the disk, of what was downloaded
            raise ValueError(
                f"data.root: {data.name} is not in '{shown(data.root)}' and could not be "
                f"downloaded ({why(error)}); put {_archives(data)}, or give the folder that has "
                "it"
            ) from None


def _archives(data: DataConfig) -> str:
    """The files that torchvision downloads, and the folder to put them into."""
    reader, folder = TORCHVISION[data.name], Path(data.root)
    if issubclass(reader, torchvision.datasets.MNIST):
        names, folder = [name for name, _ in reader.resources], folder / reader.__name__ / "raw"
    else:
        names = [reader.filename]
    return f"{', '.join(names)} into '{shown(folder)}'"


def _damaged(data: DataConfig, error: Exception) -> ValueError:
    return ValueError(
        f"data.root: {data.name} in '{shown(data.root)}' is damaged ({why(error)}); delete it, so "
        f"that it is downloaded again, or put {_archives(data)}"
    )


def _to_tensors(dataset) -> ImageTensor:
    """MNIST's `(N, H, W)` tensor or CIFAR's `(N, H, W, C)` array as `(N, C, H, W)`.

    Raises:
        ValueError: no pixels, or labels that do not fit.
    """
    images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets).long()
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    if not images.numel() or len(images) != len(labels):
        raise ValueError(f"{tuple(images.shape)} pixels with {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= len(dataset.classes):
        raise ValueError(f"labels beyond the {len(dataset.classes)} classes")
    return ImageTensor(images.contiguous(), labels)


def _from_files(data: DataConfig, source: Source) -> Datasets:
    """The images of a folder or archive, a share of each class held out."""
    classes = find_classes(source)
    train, held_out = split(classes.labels, data.held_out_fraction, classes.names)
    settings = (data.image_size, data.held_out_fraction)
    datasets = _pair(data, (source, train, classes), (source, held_out, classes), settings)
    return replace(datasets, remarks=(*classes.remarks, *source.remarks()))


def _from_two(data: DataConfig, source: Source, other: Source) -> Datasets:
    """All images of one folder or archive to train on, all of another held out."""
    train, held_out = find_classes(source), find_classes(other)
    if train.listed and held_out.listed:  # by number; either may lack the last ones
        names = max(train.names, held_out.names, key=len)
        train, held_out = (part._replace(names=names) for part in (train, held_out))
    if train.names != held_out.names:
        odd = sorted(set(train.names) ^ set(held_out.names))
        why_not = f"only one of them has '{odd[0]}'" if odd else f"only one has a {LABEL_FILE}"
        raise ValueError(
            f"data.held_out_root: the classes in '{shown(other.root)}' are not those in "
            f"'{shown(source.root)}': {why_not}"
        )
    parts = (
        (source, torch.arange(len(train.labels)), train),
        (other, torch.arange(len(held_out.labels)), held_out),
    )
    settings = (data.image_size, fingerprint_files(other, _of_list(held_out)))
    remarks = (*train.remarks, *source.remarks(), *held_out.remarks, *other.remarks())
    return replace(_pair(data, *parts, settings), remarks=remarks)


def _of_list(classes: Classes) -> tuple[str, ...]:
    """What a fingerprint has of labels that no folder names."""
    labels = classes.labels.numpy().tobytes()
    return (hashlib.sha256(labels).hexdigest(),) if classes.listed else ()


Part = tuple[Source, Tensor, Classes]  # with the indices of the part's files


def _pair(data: DataConfig, train: Part, held_out: Part, settings: tuple) -> Datasets:
    """Two splits of files; only the first file is decoded, for its shape."""
    channels, (source, _, classes) = data.channels or 3, train
    transform = Fit(data.image_size, channels, data.resize)
    first = transform(load(source, 0))
    image_shape = (channels, first.shape[1], first.shape[2])
    resize = () if data.resize == "bilinear" else (data.resize,)
    splits = [
        ImageFiles(files, part, found.labels[part], transform, image_shape)
        for files, part, found in (train, held_out)
    ]
    settings = (data.name, image_shape, *settings, *resize, *_of_list(classes))
    info = DatasetInfo(
        name=data.name,
        image_shape=image_shape,
        num_classes=len(classes.names),
        class_names=classes.names,
        num_train=len(splits[0]),
        num_held_out=len(splits[1]),
        fingerprint=fingerprint_files(source, settings),
    )
    return Datasets(splits[0], splits[1], info)
