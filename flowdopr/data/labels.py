"""The classes of images: from a dataset.json as EDM and StyleGAN write it, or one folder a class.

    {"labels": [["00000/img00000000.png", 6], ...]}     or {"labels": null}: no classes

Labels are int64 `(N,)`, 0 where there are no classes.
"""

import posixpath
import re
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from flowdopr.data.info import MOST_NAMES
from flowdopr.data.listing import LABEL_FILE
from flowdopr.data.sources import Source, shown, why
from flowdopr.disk import parse_json

# Names of folders that are parts of a data set; those that come first are preferred to train on.
SPLITS = ("train", "training", "valid", "validation", "val", "dev", "eval", "test", "testing")
EDM_NAME = re.compile(r"(.*/)?\d{5}/img\d{8}\.\w+")


class LabelFile(BaseModel):
    """The content of a dataset.json."""

    labels: list[tuple[str, Annotated[int, Field(ge=0, lt=10**6, strict=True)]]] | None


class Classes(NamedTuple):
    """The label of each of a source's images, and the names of the classes (none: no classes).

    `listed`: whether a file lists them. `remarks`: what a user should know of them.
    """

    labels: Tensor
    names: tuple[str, ...]
    listed: bool = False
    remarks: tuple[str, ...] = ()


def find_classes(source: Source) -> Classes:
    """The classes of the images of `source`.

    The labels of shards decide, or a dataset.json beside or above the images. Without them, each
    folder is a class; a folder that contains all others (`images` of `images/cat/1.png` and
    `images/dog/2.png`) is not, and neither are EDM's folders of 1,000 images.

    Raises:
        ValueError: no image at all, a dataset.json that does not list these images, some images in
            class folders and some beside them, or folders such as `train` and `val`.
    """
    refuse_empty(source)
    if (given := source.labels()) is not None:
        names = tuple(map(str, range(int(given.max()) + 1)))
        return Classes(given, names, True, (f"classes as in '{shown(source.root)}'",))
    listing = source.listing
    used = np.unique(listing.folder_of)
    folders = [source.class_folder(folder) for folder in listing.folders]
    top = _parts(posixpath.commonpath([folders[number] for number in used]))
    for depth in range(len(top), -1, -1):
        file = "/".join([*top[:depth], LABEL_FILE])
        if file in listing.label_files:
            return _listed(source, file)
    inner = {number: _parts(folders[number])[len(top) :] for number in used.tolist()}
    names = sorted({folder[0] for folder in inner.values() if folder})
    _refuse_splits(source, "/".join(top), names)
    if not any(inner.values()) or all(map(EDM_NAME.fullmatch, source.names)):
        return Classes(torch.zeros(len(source.names), dtype=torch.int64), ())
    if bare := [number for number, folder in inner.items() if not folder]:
        first = source.names[int(np.isin(listing.folder_of, bare).argmax())]
        raise ValueError(
            f"{source.setting}: '{source.where(first)}' lies beside class "
            "folders; put it into one of them, or all images into one folder"
        )
    label = {name: number for number, name in enumerate(names)}
    label_of = np.zeros(len(folders), dtype=np.int64)
    for number, folder in inner.items():
        label_of[number] = label[folder[0]]
    beside = {folder for folder in folders if posixpath.dirname(folder) == "/".join(top)}
    empty = sorted({posixpath.basename(folder) for folder in beside} - {*names, ""})
    remarks = (f"without an image: {', '.join(map(shown, empty[:MOST_NAMES]))}",) if empty else ()
    labels = torch.from_numpy(label_of[listing.folder_of])
    return Classes(labels, tuple(map(shown, names)), remarks=remarks)


def refuse_empty(source: Source) -> None:
    """ValueError if `source` has no image."""
    if not source.names:
        raise ValueError(
            f"{source.setting}: '{shown(source.root)}' holds no image that Pillow reads"
            + "".join(f"; {remark}" for remark in source.remarks())
            + ("; set data.name=tar for those" if ".tar" in source.listing.skipped else "")
        )


def _parts(folder: str) -> list[str]:
    return folder.split("/") if folder else []


def _refuse_splits(source: Source, top: str, names: list[str]) -> None:
    if not {name.lower() for name in names} <= set(SPLITS) or len(names) < 2:
        return
    first, second = sorted(names, key=lambda name: SPLITS.index(name.lower()))[:2]
    places = [source.where(posixpath.join(top, name)) for name in (first, second)]
    if source.root.is_file():
        remedy = f"make an archive of each, for data.root ('{first}') and data.held_out_root"
    else:
        remedy = f"set data.root={places[0]} and data.held_out_root={places[1]}"
    raise ValueError(
        f"{source.setting}: '{first}' and '{second}' in '{shown(source.root)}' are parts of a data "
        f"set, not classes; {remedy}"
    )


def _listed(source: Source, file: str) -> Classes:
    """The classes in the dataset.json at the path `file`, whose paths are relative to its folder.

    They are 0 to the highest label, as in EDM.
    """
    folder, remark = file.removesuffix(LABEL_FILE), f"classes as in '{source.where(file)}'"
    try:
        labels = parse_json(LabelFile, source.read_labels(file)).labels
        if labels is None:
            return Classes(torch.zeros(len(source.names), dtype=torch.int64), (), True, (remark,))
        number = {folder + path.replace("\\", "/"): label for path, label in labels}
        if lost := number.keys() - {*source.names, *source.broken}:
            raise ValueError(f"there is no image '{shown(min(lost))}'")
        if bare := set(source.names) - number.keys():
            raise ValueError(f"labels: '{shown(min(bare))}' has none")
    except Exception as error:  # reading from an archive fails in many ways
        raise ValueError(
            f"{source.setting}: '{source.where(file)}' does not list these images "
            f"({why(error)}); correct or remove it; its form is "
            '{"labels": null} or {"labels": [["PATH", NUMBER], ...]}'
        ) from None
    names = map(str, range(max(number.values()) + 1))
    labels = torch.tensor([number[name] for name in source.names])
    return Classes(labels, tuple(names), True, (remark,))
