"""What a result was made with: library versions, the commit of this package, the machine."""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flowdopr import __version__
from flowdopr.config import Config
from flowdopr.config.optimizer import PACKAGES
from flowdopr.config.own import own_code

LIBRARIES = ("torch", "torchvision", "torchdiffeq", "torch-fidelity", "accelerate")


@functools.cache
def commit() -> str:
    """The git commit of this package, `+dirty` if files changed, 'unknown' outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", "..")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+dirty" if changed else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can change a result."""
    own = {"python": platform.python_version(), "flowdopr": __version__}
    return own | _installed(LIBRARIES)


def _installed(packages: Iterable[str]) -> dict[str, str]:
    """The version of each package that is installed."""
    found = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def hardware(device: torch.device) -> str:
    """The device's name, such as 'NVIDIA H200' or 'x86_64 CPU, 2 threads'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} {device.type.upper()}, {threads} thread{'s' * (threads > 1)}"


def provenance(device: torch.device, config: Config) -> dict[str, Any]:
    """Versions, commit, hardware and the time now, for the run folder's versions.json.

    Among the versions are those of the packages that optimizers may come from, and the SHA-256 of
    code of the user's own that `config` names.
    """
    used = versions() | _installed(PACKAGES)
    made_by = {"versions": used, "commit": commit(), "hardware": hardware(device)}
    made_by |= own_code(config.model, config.data)
    return made_by | {"launched": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def with_earlier(made_by: dict[str, Any], before: dict[str, Any], step: int) -> dict[str, Any]:
    """versions.json of a run that is resumed at `step`.

    Returns:
        `made_by` with the keys "from_step", which is `step`, and "earlier", the list of what the
        steps before it were made with.

    Args:
        made_by: what `provenance` returned now.
        before: versions.json before resuming; {} for a new run. Entries that began at `step` or
            later are left out, since their steps are trained again.
    """
    latest = {key: value for key, value in before.items() if key != "earlier"}
    entries = [*before.get("earlier", []), latest]
    earlier = [entry for entry in entries if entry and entry.get("from_step", 0) < step]
    return made_by | {"from_step": step, "earlier": earlier}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=10
    ).stdout.strip()
