"""Tensors and numbers that are computed once for a data set, and kept in a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flowdopr.disk import known_json, replacing_shared, to_json, write_tensors


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


def cached_numbers(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON values of the file `path`; what `make` returns if it is missing or damaged."""
    found = known_json(path)
    if found is None:
        found = make()
        with replacing_shared(path) as part:
            part.write_text(to_json(found), encoding="utf-8")
    return found
