"""What made a result: library versions, the commit of this package, the machine."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("flowdopr", "torch", "torchvision", "torchdiffeq", "torch-fidelity", "accelerate")


@functools.cache
def commit() -> str:
    """The commit of the checkout this package runs from, `+dirty` if changed; else 'unknown'."""
    folder = Path(__file__).resolve().parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", "..")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+dirty" if changed else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a number."""
    found = {"python": platform.python_version()}
    return found | {name: metadata.version(name) for name in LIBRARIES}


def hardware(device: torch.device) -> str:
    """The device in words, such as 'NVIDIA H200' or 'x86_64 CPU, 2 threads'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} {device.type.upper()}, {threads} thread{'s' * (threads > 1)}"


def provenance(device: torch.device) -> dict[str, Any]:
    """All of the above, for the run folder's versions.json."""
    return {"versions": versions(), "commit": commit(), "hardware": hardware(device)}


def with_earlier(made_by: dict[str, Any], before: dict[str, Any], step: int) -> dict[str, Any]:
    """`made_by`, the maker of what follows `step`, with the makers of what came before.

    Args:
        before: what this function returned for the part before; {} for none. A part that began at
            `step` or later left nothing that lasts, and is dropped.
    """
    parts = [*before.get("earlier", []), {k: v for k, v in before.items() if k != "earlier"}]
    lasting = [part for part in parts if part and part.get("from_step", 0) < step]
    return made_by | {"from_step": step, "earlier": lasting}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=10
    ).stdout.strip()
