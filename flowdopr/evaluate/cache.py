"""Tensors that are computed once for a data set, and kept in a file."""

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flowdopr.disk import replacing_shared, write_tensors


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
    with replacing_shared(path) as part:
        write_tensors(part, dict(zip(names, tensors, strict=True)))
    return tensors
