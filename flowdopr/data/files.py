"""Images in a folder or in a ZIP archive, decoded on access.

Folders and archives have one of two layouts: all images in one folder (no classes), or one
sub-folder for each class. A folder that contains all others (`images` of `images/cat/1.png` and
`images/dog/2.png`) is not a class. Hidden files and files that are not images are ignored, links
are followed. Archives are read without extracting them.

Shapes: an image is uint8 `(C, H, W)`, a label an int (0 where there are no classes).
"""

import hashlib
import io
import os
import posixpath
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from flowdopr.data.memory import ImageDataset

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
CHECKSUM_LIMIT = 2**30  # bytes; a larger folder is fingerprinted by names and sizes alone


class Folder:
    """The images under a folder. `names` are sorted paths relative to it, with `/`."""

    def __init__(self, root: str | Path, setting: str = "data.root"):
        self.root = Path(root)
        if not self.root.is_dir():
            archive = self.root.is_file() and zipfile.is_zipfile(self.root)
            remedy = "set data.name=zip for an archive" if archive else "give the folder of images"
            raise ValueError(f"{setting}: there is no folder '{root}'; {remedy}")
        self.names = sorted(filter(_is_image, _files_under(self.root)))

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def where(self, name: str) -> str:
        return str(self.root / name)

    def stamps(self) -> list[tuple[int, int]]:
        """(size, CRC-32) of each image; 0 for every CRC where the folder exceeds 1 GiB."""
        sizes = [(self.root / name).stat().st_size for name in self.names]
        read = sum(sizes) <= CHECKSUM_LIMIT
        return [
            (size, zlib.crc32(self.read(name)) if read else 0)
            for name, size in zip(self.names, sizes, strict=True)
        ]


class Archive:
    """The images in a ZIP file, read in place.

    Each process opens the file for itself at its first read: a file position shared with a forked
    loader worker would hand one process the other's bytes.
    """

    def __init__(self, root: str | Path, setting: str = "data.root"):
        self.root = Path(root)
        if not self.root.is_file():
            folder = self.root.is_dir()
            remedy = "set data.name=folder for a folder" if folder else "give the archive itself"
            raise ValueError(f"{setting}: there is no ZIP file '{root}'; {remedy}")
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        try:
            entries = self._zip().infolist()
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{setting}: '{root}' cannot be read as a ZIP: {error}") from None
        self._entries = {e.filename: e for e in entries if _is_image(e.filename)}
        self.names = sorted(self._entries)

    def _zip(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self.root))
        return self._opened[1]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": None}

    def read(self, name: str) -> bytes:
        return self._zip().read(name)

    def where(self, name: str) -> str:
        return f"{self.root}:{name}"

    def stamps(self) -> list[tuple[int, int]]:
        """(size, CRC-32) of each image, from the archive's own directory."""
        return [(self._entries[name].file_size, self._entries[name].CRC) for name in self.names]


def _files_under(
    folder: str | Path, prefix: str = "", above: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Paths of all files, with `/`; links to folders are followed unless they lead back up."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files_under(entry.path, f"{prefix}{entry.name}/", above | {real})
            elif entry.is_file():
                yield prefix + entry.name


def _is_image(name: str) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    return not hidden and posixpath.splitext(name)[1].lower() in SUFFIXES


def _parts(folder: str) -> list[str]:
    return folder.split("/") if folder else []


def find_classes(source: Folder | Archive) -> tuple[list[int], tuple[str, ...]]:
    """Label of each of `source.names`, and the sorted class names (none: the layout is flat).

    Raises:
        ValueError: no image at all, or some images in class folders and some beside them.
    """
    if not source.names:
        kinds = " ".join(sorted(SUFFIXES))
        raise ValueError(f"data.root: '{source.root}' holds no image ({kinds})")
    folders = [posixpath.dirname(name) for name in source.names]
    depth = len(_parts(posixpath.commonpath(folders)))
    inner = [_parts(folder)[depth:] for folder in folders]
    if not any(inner):
        return [0] * len(inner), ()
    if [] in inner:
        stray = source.where(source.names[inner.index([])])
        raise ValueError(
            f"data.root: '{stray}' lies beside class folders; put it into one of them, or all "
            "images into one folder"
        )
    classes = [folder[0] for folder in inner]
    names = tuple(sorted(set(classes)))
    number = {name: label for label, name in enumerate(names)}
    return [number[name] for name in classes], names


def fingerprint_files(source: Folder | Archive, settings: Sequence[object]) -> str:
    """sha256 over the images' names, sizes and CRC-32s and over `settings`.

    Of a folder of more than 1 GiB only names and sizes count: reading it all at every start would
    take minutes. An archive brings its CRCs along.
    """
    digest = hashlib.sha256(repr(tuple(settings)).encode())
    for name, stamp in zip(source.names, source.stamps(), strict=True):
        digest.update(f"{name}\0{stamp}\n".encode())
    return digest.hexdigest()


def decode(source: Folder | Archive, name: str) -> Tensor:
    """uint8 RGB `(3, H, W)`, upright; ValueError with one line if the file is no 8-bit image."""
    try:
        with Image.open(io.BytesIO(source.read(name))) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{image.mode} pixels, expected 8 bits a channel")
            return pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # decoders fail in many ways; each must name its file
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no image format known" if unknown else " ".join(str(error).split())
        raise ValueError(
            f"data.root: cannot read the image '{source.where(name)}' ({reason}); "
            "repair or remove it"
        ) from None


class ImageFiles(ImageDataset):
    """Some images of a folder or archive, all transformed to one shape."""

    def __init__(
        self,
        source: Folder | Archive,
        indices: Tensor,
        labels: Tensor,
        transform: Callable[[Tensor], Tensor],
        image_shape: tuple[int, int, int],
    ):
        self.source, self.indices, self.labels = source, indices, labels
        self.transform, self.image_shape = transform, image_shape

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name = self.source.names[int(self.indices[index])]
        image = self.transform(decode(self.source, name))
        if tuple(image.shape) != self.image_shape:
            (_, h, w), (_, height, width) = image.shape, self.image_shape
            raise ValueError(
                f"data.root: '{self.source.where(name)}' has {w}x{h} pixels, the others "
                f"{width}x{height}; set data.image_size to bring all to one size"
            )
        return image, int(self.labels[index])
