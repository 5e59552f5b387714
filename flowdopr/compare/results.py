"""What is known of one run, read from its folder: the plain data behind tables and plots."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Status = Literal["done", "failed", "unfinished", "not started"]


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one evaluation card. `nfe` counts model calls per image."""

    step: int
    one_step_loss: float | None = None
    fd: float | None = None
    """Frechet distance of the rollouts, FD or FID as `RunResult.metric` says; lower is better."""
    label_accuracy: float | None = None
    nfe: float | None = None
    num_images: int | None = None


@dataclass(frozen=True)
class RunResult:
    """One run of a study, finished or not."""

    arm: str
    lr: float
    seed: int
    name: str = ""
    path: Path = Path()
    optimizer: str = ""
    dopr: bool = False
    """Whether activation preconditioning comes before the optimizer."""
    setting: str = ""
    """All settings outside `optimizer` and the seed, as JSON: arms that share it form pairs."""
    status: Status = "done"
    reason: str = ""
    """Why the run failed, in its own last words."""
    metric: str = "FD"
    """`FID` in the Inception feature space, `FD` in any other."""
    final: Evaluation | None = None
    curve: tuple[Evaluation, ...] = ()
    """Evaluations of all checkpoints, by step, the last included."""
    by_nfe: tuple[Evaluation, ...] = ()
    """Evaluations of the last checkpoint, by NFE."""
    global_batch_size: int = 0
    images_seen: int = 0
    seconds_per_step: float | None = None
    peak_memory_bytes: float | None = None
    hardware: str = ""
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    sample_grid: Path | None = None
    extractor: str = ""
    sampling: str = ""

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def fd(self) -> float | None:
        return self.final.fd if self.final else None

    @property
    def one_step_loss(self) -> float | None:
        return self.final.one_step_loss if self.final else None

    @property
    def label_accuracy(self) -> float | None:
        return self.final.label_accuracy if self.final else None
