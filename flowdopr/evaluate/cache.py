"""Tensors that are computed once for a data set, and kept in a file."""

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowdopr.disk import replacing


def cached_tensors(
    path: Path, names: tuple[str, ...], make: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """The tensors `names` of the file `path`; what `make` returns if it is missing or damaged.

    The file cannot run code, and is written whole or not at all, also by several processes.
    """
    try:
        found = load_file(path)
        return tuple(found[name] for name in names)
    except (OSError, SafetensorError, KeyError):
        tensors = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, f".{os.getpid()}.part") as part:
        save_file(dict(zip(names, tensors, strict=True)), part)
    return tensors
