"""report.html, table.csv, results.json and plots/ from the run folders of a study.

The report is one file: its pictures are inside it, it loads nothing and runs no script.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from flowdopr.compare.formats import count, number, percent, seconds
from flowdopr.compare.plan import study_path, study_settings
from flowdopr.compare.plots import draw_all, looks
from flowdopr.compare.results import RunResult
from flowdopr.compare.statistics import ArmSummary, spread, summarise
from flowdopr.compare.table import rows, shared_values, shown_rows, to_csv, to_results
from flowdopr.compare.verdict import Verdict, metric_name, verdict
from flowdopr.config import Config, to_yaml
from flowdopr.disk import write_bytes, write_text

CAPTIONS = {
    "scatter": "Rollout quality against one-step loss, one marker a run: down and left is better. "
    "Hollow: not at the tuned learning rate.",
    "training": "Both over training: the mean of each arm, its seeds thin.",
    "nfe": "Rollout quality by model calls per image, last checkpoint.",
    "learning-rate": "Rollout quality by learning rate; the tuned one is filled.",
}
METRIC_WORDS = {
    "FD": "FD: Fréchet distance between rollouts and training images in the feature space of a "
    "classifier of this data set; it is not an FID.",
    "FID": "FID: Fréchet distance between rollouts and training images in Inception's features.",
}


def write_report(config: Config, runs: Sequence[RunResult]) -> Verdict:
    """Write every file of the study's report into its folder; returns what it says in words."""
    folder = study_path(config)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    summaries = summarise(runs)
    said = verdict(runs, summaries)
    pictures = {
        name: to_png(figure) for name, figure in draw_all(metric_name(runs), summaries).items()
    }
    for name, png in pictures.items():
        write_bytes(folder / "plots" / f"{name}.png", png)
    results = to_results(config.name, runs, summaries, said)
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "table.csv", to_csv(rows(runs, summaries)))
    write_text(folder / "report.html", render(config, runs, summaries, pictures))
    return said


def render(
    config: Config,
    runs: Sequence[RunResult],
    summaries: Sequence[ArmSummary],
    pictures: dict[str, bytes],
) -> str:
    """The page; `pictures` are PNGs by plot name. Names are escaped, pictures are inside."""
    metric = metric_name(runs)
    table = rows(runs, summaries)
    first = next((run for run in runs if run.versions), None)
    plots = [
        {"title": CAPTIONS[name], "image": to_uri(png), "wide": name == "training"}
        for name, png in pictures.items()
    ]
    environment = Environment(
        loader=PackageLoader("flowdopr.compare", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        study=config.name,
        subtitle=_subtitle(runs, summaries),
        verdict=verdict(runs, summaries),
        winner=_winner(table),
        metric=metric,
        metric_words=METRIC_WORDS[metric],
        table=shown_rows(metric, table),
        shared=shared_values(metric, table),
        beside=min(study_settings(config).workers, len(runs)),
        colours={arm: look.colour for arm, look in looks(summaries).items()},
        failed=[run for run in runs if run.status == "failed"],
        plots=plots,
        samples=_samples(summaries),
        settings=_settings(config, runs),
        config=to_yaml(config),
        versions=first.versions if first else {},
        every_run=[_run_row(run) for run in runs],
    )


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def to_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _subtitle(runs: Sequence[RunResult], summaries: Sequence[ArmSummary]) -> str:
    arms, done = count(len(summaries), "arm"), sum(run.done for run in runs)
    return f"Optimizers compared: {arms}, {count(len(runs), 'run')}, {done} finished."


def _winner(table: Sequence[dict[str, Any]]) -> str | None:
    known = [(row["fd_mean"], row["arm"]) for row in table if row["fd_mean"] is not None]
    return min(known)[1] if len(known) > 1 else None


def _samples(summaries: Sequence[ArmSummary]) -> list[dict[str, str]]:
    found = []
    for arm in summaries:
        run = arm.tuned.runs[0] if arm.tuned else None
        if run is not None and run.sample_grid is not None:
            found.append({"title": arm.arm, "image": to_uri(run.sample_grid.read_bytes())})
    return found


def _settings(config: Config, runs: Sequence[RunResult]) -> dict[str, str]:
    train = config.train
    chosen = {"name": config.model.name} | config.model.model_dump(exclude_defaults=True)
    evaluated = next((run for run in runs if run.final), None)
    seeds = sorted({run.seed for run in runs})
    shown = {
        "data": config.data.name,
        "model": ", ".join(f"{key} {value}" for key, value in chosen.items()),
        "training": f"{train.steps:,} steps of {train.global_batch_size} images, "
        f"learning rate {train.lr_decay} "
        f"after {count(train.warmup_steps, 'warm-up step')}",
        "weight averages": ", ".join(
            [f"EMA {decay:g}" for decay in train.ema_decays]
            + [f"power-function {length:g}" for length in train.ema_lengths]
        ),
        "seeds": ", ".join(map(str, seeds)),
    }
    if evaluated is not None:
        shown |= {"sampling": evaluated.sampling, "feature space": evaluated.extractor}
    return shown


def _run_row(run: RunResult) -> list[str]:
    return [
        run.name,
        run.status,
        number(run.fd, 3),
        number(run.one_step_loss),
        percent(spread([run.label_accuracy])),
        seconds(run.seconds_per_step),
    ]
