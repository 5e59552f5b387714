"""The folder of one checkpoint: its files, their checksums, and the rule by which it is kept.

    model.safetensors, ema-0.9999.safetensors, power-0.1.safetensors, ...: weights
    state.pt          optimizer and all else that training needs
    config.yaml, dataset.json, versions.json, metrics.jsonl: those of the run at this step
    checkpoint.json   step, images, and the size and SHA-256 of each file above

So a checkpoint can be checked, and restores the run's own files if these are damaged. Checkpoints
of earlier versions have neither checksums nor the run's own files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowdopr.config.schema import TrainConfig
from flowdopr.disk import file_sha256, read_json, reading, replacing_folder, sealed, to_json
from flowdopr.runs.contents import Manifest

MANIFEST = "checkpoint.json"


@contextmanager
def new_checkpoint(folder: Path, note: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a folder to write the files into, which then becomes the checkpoint `folder`.

    Args:
        note: plain values for checkpoint.json, the step among them.

    Raises:
        WriteError: a full disk, for example; there is no such checkpoint then.
    """
    with replacing_folder(folder) as part:
        yield part
        write_manifest(part, note)


def write_manifest(folder: Path, note: Mapping[str, Any]) -> None:
    """Write checkpoint.json for the files that are in `folder` now."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(to_json(sealed({**note, "files": files})))


def manifest_of(folder: Path, remedy: str) -> Manifest:
    """The content of checkpoint.json.

    Raises:
        ValueError: it is missing or damaged, or belongs to another step.
    """
    found = read_json(folder / MANIFEST, remedy, Manifest)
    with reading(folder / MANIFEST, remedy):
        if not folder.name.startswith(f"step-{found['step']:08d}"):
            raise ValueError(f"it belongs to step {found['step']}")
    return found


def checked_file(folder: Path, name: str, remedy: str) -> Path:
    """The path of a file of the checkpoint, which is as it was written.

    Raises:
        ValueError: it is missing or damaged; the message names it and ends with `remedy`.
    """
    files, path = manifest_of(folder, remedy).get("files"), folder / name
    if files is None:  # of an earlier version
        return path
    with reading(path, remedy):
        size = path.stat().st_size
        if name not in files:
            raise ValueError(f"{MANIFEST} does not list it")
        if size != files[name]["bytes"]:
            raise ValueError(f"it has {size:,} bytes instead of {files[name]['bytes']:,}")
        if file_sha256(path) != files[name]["sha256"]:
            raise ValueError(f"its SHA-256 is not the one in {MANIFEST}")
    return path


def has_checksums(folder: Path, remedy: str) -> bool:
    """Whether the checkpoint was not made by an earlier version; raises as `manifest_of`."""
    return "files" in manifest_of(folder, remedy)


def kept_steps(steps: Sequence[int], settings: TrainConfig, metrics: str = "") -> set[int]:
    """Those of the checkpoints' `steps` (ascending) that stay on disk.

    Args:
        metrics: the lines of metrics.jsonl, for `train.keep_best`.
    """
    if settings.keep_checkpoints is None:
        return set(steps)
    kept = set(steps[-settings.keep_checkpoints :])
    if settings.keep_every is not None:
        kept |= {step for step in steps if step % settings.keep_every == 0}
    if settings.keep_best:
        lines = [json.loads(line) for line in metrics.splitlines()]
        losses = [(line.get("held_out_loss"), line["step"]) for line in lines]
        known = [one for one in losses if one[0] is not None and one[1] in steps]
        kept |= {step for _, step in sorted(known)[:1]}
    return kept


def step_name(step: int) -> str:
    """The name of the folder of a checkpoint."""
    return f"step-{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """Steps of the folders named `step-00000500` in `folder`, ascending."""
    names = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)
