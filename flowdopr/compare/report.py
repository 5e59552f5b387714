"""report.html, table.csv, results.json and plots/ from the run folders of a study.

The report is one file: its pictures are inside it and it loads nothing. A script sorts its tables.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from datetime import datetime, timezone

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from flowdopr.compare.differences import differing_settings
from flowdopr.compare.formats import NONE, count, distinct, number, percent, seconds, when
from flowdopr.compare.pictures import neighbours, rows_of_samples, sample_grids, to_uri
from flowdopr.compare.plan import study_settings
from flowdopr.compare.plots import draw_all
from flowdopr.compare.results import RunResult
from flowdopr.compare.statistics import spread
from flowdopr.compare.study import Study
from flowdopr.compare.table import Row, rows, shared_values, shown_rows, to_csv, to_results, to_tex
from flowdopr.config import to_yaml
from flowdopr.disk import write_bytes, write_json, write_text

CAPTIONS = {
    "scatter": "Rollout quality against one-step loss, one marker a run: down and left is better. "
    "Hollow: not reported. Thin: over training. Bars: the losses over which the ratio of a pair at "
    "equal loss is averaged.",
    "fd-by-steps": "Rollout quality over training: the mean of each arm, its seeds thin.",
    "fd-by-seconds": "The same over the time of training; evaluation does not count.",
    "one-step-loss-by-steps": "One-step loss over training.",
    "one-step-loss-by-seconds": "The same over the time of training.",
    "nfe": "Rollout quality by model calls per image, last checkpoint.",
    "fd-by-images": "Rollout quality by number of images, on the scale of 1 / number, and where a "
    "straight line meets infinitely many. Stars: real held-out images.",
    "spectrum": "Variance of the rollouts along the principal directions of the data, over the "
    "data's own: 1 is right. Dotted: real held-out images.",
    "loss-by-time": "One-step loss by time, over the mean of all arms; bars: two standard errors.",
    "learning-rate": "Rollout quality by learning rate; the tuned one is filled.",
}
SPACES = {
    "classifier": "the feature space of a classifier of this data set; it is not an FID",
    "imagenet": "the features of a network trained on photographs; it is not an FID",
    "dinov2": "the features of DINOv2; it is not an FID",
    "inception": "Inception's features",
}
"""By the name of `evaluate.extractor`."""


def write_report(study: Study) -> None:
    """Write every file of the report into the study's folder."""
    (study.folder / "plots").mkdir(parents=True, exist_ok=True)
    table = rows(study)
    pictures = {name: to_png(figure) for name, figure in draw_all(study).items()}
    for name, png in pictures.items():
        write_bytes(study.folder / "plots" / f"{name}.png", png)
    write_json(study.folder / "results.json", to_results(study, table))
    write_text(study.folder / "table.csv", to_csv(table))
    write_text(study.folder / "table.tex", to_tex(shown_rows(study, table)))
    write_text(study.folder / "report.html", render(study, table, pictures))


def render(study: Study, table: Sequence[Row], pictures: dict[str, bytes]) -> str:
    """The page as HTML.

    Args:
        table: `rows` of the study.
        pictures: PNGs by plot name.
    """
    environment = Environment(
        loader=PackageLoader("flowdopr.compare", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        study=study,
        subtitle=_subtitle(study),
        metric_words=f"{study.metric}: Fréchet distance between rollouts and training images in "
        f"{SPACES[study.config.evaluate.extractor.name]}.",
        table=shown_rows(study, table),
        shared=shared_values(study, table),
        runs_at_a_time=min(study_settings(study.config).workers, len(study.runs)),
        failed=[run for run in study.runs if run.status == "failed"],
        plots=[
            {"title": CAPTIONS[name if name in CAPTIONS else "nfe"], "image": to_uri(png)}
            for name, png in pictures.items()
        ],
        rows=rows_of_samples(study),
        grids=sample_grids(study),
        neighbours=neighbours(study),
        settings=_settings(study),
        differences=differing_settings(study.arms),
        config=to_yaml(study.config),
        versions=next((run.versions for run in study.runs if run.versions), {}),
        every_run=[_run_row(run) for run in study.runs],
    )


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _subtitle(study: Study) -> str:
    arms, runs = count(len(study.arms), "arm"), count(len(study.runs), "run")
    done = sum(run.done for run in study.runs)
    today = when(datetime.now(timezone.utc).isoformat())
    return f"Optimizers compared: {arms}, {runs}, {done} finished. Report of {today}."


def _settings(study: Study) -> dict[str, str]:
    config, train, compare = study.config, study.config.train, study_settings(study.config)
    chosen = {"name": config.model.name} | config.model.model_dump(exclude_defaults=True)
    evaluated = next((run for run in study.runs if run.final), None)
    shown = {
        "data": _data(study),
        "model": ", ".join(f"{key} {value}" for key, value in chosen.items()),
        "parameters": distinct(f"{run.num_parameters:,}" for run in study.runs if run.done) or NONE,
        "training": f"{train.steps:,} steps of {train.global_batch_size} images, "
        f"learning rate {train.lr_decay} "
        f"after {count(train.warmup_steps, 'warm-up step')}",
        "weight averages": ", ".join(
            [f"EMA {decay:g}" for decay in train.ema_decays]
            + [f"power-function {length:g}" for length in train.ema_lengths]
        )
        or "the optimizer's own",
        "seeds": ", ".join(map(str, compare.seeds)),
    }
    if compare.tuning_seeds:
        shown["tuning seeds"] = ", ".join(map(str, compare.tuning_seeds))
    if evaluated is not None:
        shown |= {"sampling": evaluated.sampling, "feature space": evaluated.extractor}
    launches = sorted(time for run in study.runs for time in run.launched)
    if launches:
        shown["runs launched"] = " to ".join(dict.fromkeys(map(when, (launches[0], launches[-1]))))
    return shown


def _data(study: Study) -> str:
    name, info = study.config.data.name, study.dataset
    if info is None:
        return name
    channels, height, width = info.image_shape
    kind = (
        f"{height} × {width} images" if info.autoencoder is None else f"{height} × {width} latents"
    )
    channels = count(channels, "channel")
    split = f"{info.num_train:,} to train on, {info.num_held_out:,} held out"
    return f"{name}: {kind} of {channels}, {split}, {info.num_classes or 'no'} classes"


def _launches(times: Sequence[str]) -> str:
    """The first launch of a run, and how often it was launched if not once."""
    if not times:
        return NONE
    return when(times[0]) + (f", in {len(times)} launches" if len(times) > 1 else "")


def _run_row(run: RunResult) -> dict[str, str | list[str]]:
    """The cells of a run in the list of every run, and the command that repeats it alone."""
    cells = [
        run.plan.name,
        run.status,
        number(run.value("fd"), 3),
        number(run.value("one_step_loss")),
        percent(spread([run.value("label_accuracy")])),
        seconds(run.seconds_per_step),
        _launches(run.launched),
    ]
    command = shlex.join(["flowdopr", "train", str(run.plan.path / "config.yaml"), "name=NEW"])
    started = run.status != "not started"
    return {"name": run.plan.name, "cells": cells, "command": command if started else ""}
