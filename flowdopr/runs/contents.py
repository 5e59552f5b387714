"""What readers of a run folder's files rely on. The files may hold more, which is kept."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, with_config
from torch import Tensor
from typing_extensions import NotRequired, TypedDict


@with_config(ConfigDict(extra="allow"))
class Launch(TypedDict, total=False):
    """What `provenance` returns."""

    versions: dict[str, str]
    commit: str
    hardware: str
    code: dict[str, str]
    launched: str
    from_step: int


@with_config(ConfigDict(extra="allow"))
class MadeBy(Launch, total=False):
    """versions.json."""

    earlier: list[Launch]


@with_config(ConfigDict(extra="allow"))
class MetricsLine(TypedDict):
    """A line of metrics.jsonl."""

    step: int
    loss: NotRequired[float | None]
    held_out_loss: NotRequired[float | None]
    skipped: NotRequired[int]
    seconds_per_step: NotRequired[float]
    images_per_second: NotRequired[float]
    data_wait: NotRequired[float]
    forward: NotRequired[float]
    backward: NotRequired[float]
    optimizer: NotRequired[float]
    evaluation_seconds: NotRequired[float]
    peak_memory_mib: NotRequired[float]


class FileRecord(TypedDict):
    """What checkpoint.json says of a file."""

    bytes: int
    sha256: str


@with_config(ConfigDict(extra="allow"))
class Manifest(TypedDict):
    """checkpoint.json; without `files`, that of an earlier version."""

    step: int
    files: NotRequired[dict[str, FileRecord]]


@with_config(ConfigDict(arbitrary_types_allowed=True))
class State(TypedDict):
    """state.pt of a checkpoint."""

    losses: Tensor
    skipped: NotRequired[list[int]]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
