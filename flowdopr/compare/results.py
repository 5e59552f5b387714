"""The numbers of one run, read from its folder, for tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from flowdopr.compare.cards import Card, CardRequest, RunSnapshot
from flowdopr.compare.plan import RunPlan
from flowdopr.data import DatasetInfo
from flowdopr.runs import RunFolder

Status = Literal["done", "failed", "unfinished", "not started"]
Metric = Literal[
    "fd",
    "fd_infinity",
    "kid_mean",
    "precision",
    "recall",
    "spectrum_error",
    "one_step_loss",
    "label_accuracy",
]
"""The metrics that are compared, as fields of `Evaluation`."""
LISTS = ("spectrum", "one_step_loss_by_time", "one_step_loss_by_time_se")


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one evaluation card, named as there. `nfe` counts model calls per image."""

    step: int
    one_step_loss: float | None = None
    fd: float | None = None
    """Frechet distance of the rollouts, FD or FID as `RunResult.metric` says; lower is better."""
    fd_infinity: float | None = None
    """That of infinitely many rollouts, extrapolated from `fd_by_images`."""
    fd_by_images: tuple[tuple[int, float | None], ...] = ()
    kid_mean: float | None = None
    precision: float | None = None
    recall: float | None = None
    spectrum_error: float | None = None
    label_accuracy: float | None = None
    spectrum: tuple[float | None, ...] = ()
    one_step_loss_by_time: tuple[float | None, ...] = ()
    one_step_loss_by_time_se: tuple[float | None, ...] = ()
    solver: str = ""
    nfe: float | None = None
    num_images: int | None = None


@dataclass(frozen=True)
class RunResult:
    """One run of a study. The fields after `metric` are filled once it is trained and evaluated."""

    plan: RunPlan
    status: Status = "done"
    reason: str = ""
    """Why the run failed: its error message, or the last lines that it printed."""
    metric: str = "FD"
    """`FID` in the Inception feature space, `FD` in any other."""
    final: Evaluation | None = None
    curve: tuple[Evaluation, ...] = ()
    """Evaluations of all checkpoints, the last one included, by step."""
    by_nfe: tuple[Evaluation, ...] = ()
    """Evaluations of the last checkpoint, by solver and NFE."""
    by_noise: tuple[Evaluation, ...] = ()
    """Evaluations of the last checkpoint with other evaluation seeds than the study's own."""
    by_weights: dict[str, tuple[Evaluation, ...]] = field(default_factory=dict)
    """Evaluations of all checkpoints, by step, with each further weight average."""
    shorter: tuple[RunResult, ...] = ()
    """The runs of fewer steps, otherwise the same, finished or not; filled by `with_shorter`."""
    floor: Evaluation | None = None
    """The same metrics of real held-out images."""
    num_parameters: int = 0
    dataset: DatasetInfo | None = None
    launched: tuple[str, ...] = ()
    """When each launch of the training began, in UTC, as far as the run folder tells."""
    global_batch_size: int = 0
    images_seen: int = 0
    seconds_per_step: float | None = None
    peak_memory_bytes: float | None = None
    hardware: str = ""
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    sample_grid: Path | None = None
    gallery: Path | None = None
    """The file beside the card of `final`, see `flowdopr/evaluate/gallery.py`."""
    nearest_ratio: float | None = None
    """Median distance of generated images to their nearest training images, over that of real
    held-out images; well below 1 where the model copies."""
    extractor: str = ""
    sampling: str = ""

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def ended(self) -> bool:
        """Whether it is done or has failed."""
        return self.status in ("done", "failed")

    def value(self, metric: Metric) -> float | None:
        """A metric of the last checkpoint; None if it was not evaluated or is not finite."""
        return getattr(self.final, metric) if self.final else None


def read_result(run: RunSnapshot) -> RunResult:
    """The status of a planned run, and its numbers once it is done."""
    plan = run.plan
    if run.folder is not None and run.finished:
        return _finished(run, run.folder)
    if plan.failure.exists():
        return RunResult(plan, "failed", plan.failure.read_text(encoding="utf-8").strip())
    return RunResult(plan, "unfinished" if plan.path.exists() else "not started")


def with_shorter(runs: Sequence[RunResult]) -> list[RunResult]:
    """The runs of full length, each with its shorter ones.

    One whose shorter runs have failed keeps them, so that its checkpoints in the middle of a decay
    are not compared in place of their ends.
    """

    def belongs(run: RunResult, other: RunResult) -> bool:
        one, two = run.plan, other.plan
        same = (one.arm, one.trial, one.seed) == (two.arm, two.trial, two.seed)
        return same and two.shorter

    return [
        replace(run, shorter=tuple(other for other in runs if belongs(run, other)))
        for run in runs
        if not run.plan.shorter
    ]


def _finished(run: RunSnapshot, folder: RunFolder) -> RunResult:
    made_by, train = folder.made_by(), run.plan.config.train
    launches = [*made_by.get("earlier", []), made_by]
    windows = [line for line in folder.metrics() if "seconds_per_step" in line]
    speeds = [line["seconds_per_step"] for line in windows[1:] or windows]  # without the warm-up
    grids = sorted((folder.path / "samples").glob("step-*.png"))
    card = run.cards[run.wanted.final]
    gallery = card.get("gallery") or {}
    final, metric = _evaluation(card), "FID" if "fid" in card["metrics"] else "FD"
    return RunResult(
        run.plan,
        status="failed" if final.fd is None else "done",
        reason=f"the {metric} of its samples is not finite" if final.fd is None else "",
        metric=metric,
        final=final,
        floor=_numbers(run.plan.config.train.steps, card.get("floor") or {}),
        curve=_evaluations(run, (*run.wanted.curve, run.wanted.final)),
        by_nfe=_evaluations(run, run.wanted.by_nfe),
        by_noise=_evaluations(run, run.wanted.by_noise),
        by_weights={
            weights: _evaluations(run, requests)
            for weights, requests in run.wanted.by_weights.items()
        },
        num_parameters=folder.num_parameters(),
        dataset=folder.dataset,
        launched=tuple(one["launched"] for one in launches if "launched" in one),
        global_batch_size=train.global_batch_size,
        images_seen=train.global_batch_size * train.steps,
        seconds_per_step=median(speeds) if speeds else None,
        peak_memory_bytes=max((line["peak_memory_mib"] * 2**20 for line in windows), default=None),
        hardware=" | ".join(dict.fromkeys(one.get("hardware", "unknown") for one in launches)),
        commit=" | ".join(dict.fromkeys(one.get("commit", "unknown") for one in launches)),
        versions=made_by.get("versions", {}),
        sample_grid=grids[-1] if grids else None,
        gallery=folder.path / "evaluation" / Path(gallery["file"]).name if gallery else None,
        nearest_ratio=gallery.get("nearest_ratio"),
        extractor=_extractor(card),
        sampling=_sampling(card),
    )


def _evaluations(run: RunSnapshot, requests: Sequence[CardRequest]) -> tuple[Evaluation, ...]:
    return tuple(_evaluation(run.cards[request]) for request in requests if request in run.cards)


def _evaluation(card: Card) -> Evaluation:
    found = _numbers(card["step"], card["metrics"])
    sampling = card["settings"]["sampling"]
    solver, num_images = sampling["solver"]["name"], sampling["num_images"]
    return replace(found, solver=solver, nfe=card["sampling"]["nfe"], num_images=num_images)


def _numbers(step: int, metrics: Card) -> Evaluation:
    """The metrics of a card, or of its floor, that a study shows."""
    values: dict[str, Any] = {name: metrics.get(name) for name in get_args(Metric)}
    for name in ("fd", "fd_infinity", "fd_by_images"):  # in Inception's features: fid, ...
        values[name] = metrics.get(name.replace("fd", "fid"), metrics.get(name))
    values["fd_by_images"] = tuple((number, fd) for number, fd in values["fd_by_images"] or ())
    values |= {name: tuple(metrics.get(name) or ()) for name in LISTS}
    return Evaluation(step, **values, num_images=metrics.get("num_images"))


def _extractor(card: Card) -> str:
    held_out, warning = (card["extractor"].get(key) for key in ("held_out_accuracy", "warning"))
    accuracy = "" if held_out is None else f", {100 * held_out:.1f} % accurate on held-out images"
    return f"{card['extractor'].get('space', 'none')}{accuracy}" + (
        f"; {warning}" if warning else ""
    )


def _sampling(card: Card) -> str:
    sampling = card["settings"]["sampling"]
    solver, guidance = sampling["solver"], sampling["guidance"]
    if "steps" in solver:
        accuracy = f"{solver['steps']} steps"
    else:
        accuracy = f"tolerances {solver['atol']}, {solver['rtol']}"
    guided = f"guidance scale {guidance['scale']:g}" if guidance else "no guidance"
    return (
        f"{solver['name']}, {accuracy}, {guided}, "
        f"{card['weights']} weights, {sampling['labels']} labels, seed {sampling['seed']}"
    )
