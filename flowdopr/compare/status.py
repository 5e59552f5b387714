"""`flowdopr status`: how far a run or a study is, from its files alone, also while it runs."""

from __future__ import annotations

import re
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

from flowdopr.compare.forecast import forecast
from flowdopr.compare.formats import count, number, seconds
from flowdopr.config import ConfigError, load_config
from flowdopr.evaluate.card import read_card
from flowdopr.runs import RunFolder
from flowdopr.train.meter import PARTS

WARNING = re.compile(r"^\S+ \S+ (?:WARNING|ERROR) (.*)$", re.M)
MOST_SHOWN = 8  # runs of a study, or warnings of a run
KINDS = {  # of warnings of the loop and of DoPr, each about one step or one layer
    "skipped steps": re.compile(r"step (\d+): .* the step is skipped"),
    "layers with inputs that are not finite": re.compile(r"layer (.+): inputs are not finite"),
    "layers with damping raised": re.compile(r"layer (.+): damping .*; damping raised"),
    "layers without statistics": re.compile(r"layer (.+): has a gradient, but no refresh"),
}


def status(path: str | Path) -> str:
    """One screen about the run or the study in the folder `path`.

    Raises:
        ConfigError: the folder holds neither.
    """
    path = Path(path)
    if (path / "study.yaml").is_file():
        return _study(path)
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path}: neither a run nor a study: no config.yaml and no study.yaml")
    run = RunFolder.open(path)
    logged = run.metrics()
    lines = [f"{path}: {_how_far(run, logged)}", *_numbers(run, logged), _checkpoints(run)]
    return "\n".join([*lines, *_health([run])])


def _study(path: Path) -> str:
    """The plan and what is left of it, and a line for each run that is on its way."""
    config = load_config(path / "study.yaml", follow_base=False)
    place = path.resolve()  # the study may have been moved, or begun from another folder
    config = config.model_copy(update={"output": str(place.parent), "name": place.name})
    folders = sorted(file.parent for file in path.glob("*/config.yaml"))
    runs = [RunFolder.open(folder) for folder in folders]
    going = [run for run in runs if run.config.train.steps not in run.steps()]
    lines = [f"{path}: {count(len(runs), 'run')} begun", forecast(config)]
    lines += [f"{run.path.name}: {_how_far(run, run.metrics())}" for run in going[:MOST_SHOWN]]
    if len(going) > MOST_SHOWN:
        lines.append(f"... and {len(going) - MOST_SHOWN} more")
    if (path / "report.html").is_file():
        lines.append(f"report: {path / 'report.html'}")
    return "\n".join([*lines, *_health(runs)])


def _how_far(run: RunFolder, lines: list[dict[str, Any]]) -> str:
    steps = run.config.train.steps
    step = max((line["step"] for line in lines), default=0)
    done = f"step {step:,} of {steps:,} ({100 * step / steps:.0f} %)"
    if steps in run.steps():
        return f"{done}, complete"
    windows = [line for line in lines if "seconds_per_step" in line]
    if not windows:
        return f"{done}, nothing logged yet"
    spent = _spent(lines)
    looking = 1 + spent["evaluation"] / spent["training"]
    left = timedelta(seconds=round((steps - step) * windows[-1]["seconds_per_step"] * looking))
    age = timedelta(seconds=round(time.time() - (run.path / "metrics.jsonl").stat().st_mtime))
    return f"{done}, {left} left, last line {age} ago"


def _numbers(run: RunFolder, lines: list[dict[str, Any]]) -> list[str]:
    """The newest loss, held-out loss and Frechet distance, the speed and the memory."""
    newest: dict[str, tuple[int, Any]] = {}
    for line in lines:
        newest |= {key: (line["step"], value) for key, value in line.items()}
    words = {"loss": "loss", "held_out_loss": "held-out loss", "grad_norm": "gradient norm"}
    quality = [
        f"{word} {number(newest[key][1])} (step {newest[key][0]:,})"
        for key, word in words.items()
        if key in newest
    ]
    quality += _distance(run)
    if "seconds_per_step" not in newest:
        return []
    speed = [
        f"{newest['images_per_second'][1]:,.0f} images/s",
        f"{seconds(newest['seconds_per_step'][1])} a step",
        f"{newest['peak_memory_mib'][1]:,.0f} MiB",
    ]
    return ["; ".join(quality), ", ".join(speed), _shares(lines)]


def _distance(run: RunFolder) -> list[str]:
    """The Frechet distance of the newest checkpoint that has one, of the most images if there are
    several, with what it depends on."""
    cards = filter(None, map(read_card, (run.path / "evaluation").glob("*.json")))
    found = [(card, name) for card in cards for name in ("fd", "fid") if name in card["metrics"]]
    if not found:
        return []
    card, name = max(found, key=lambda one: (one[0]["step"], one[0]["sampling"]["num_images"]))
    return [
        f"{name.upper()} {number(card['metrics'][name])} (step {card['step']:,}, "
        f"{count(card['sampling']['num_images'], 'image')} against {card['reference']['name']}, "
        f"{card['extractor'].get('name', 'none')})"
    ]


def _spent(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of training and of its parts so far, and those of held-out losses and grids."""
    spent, before = dict.fromkeys((*PARTS, "evaluation", "training"), 0.0), 0
    for line in lines:
        spent["evaluation"] += line.get("evaluation_seconds", 0.0)
        if "seconds_per_step" in line:
            seconds = line["seconds_per_step"] * (line["step"] - before)
            before = line["step"]
            spent["training"] += seconds
            for part in PARTS:
                spent[part] += seconds * line.get(part, 0.0)
    return spent


def _shares(lines: list[dict[str, Any]]) -> str:
    """Of the time so far; on a GPU, waiting for data may overlap the other parts. Those that were
    not measured, as in runs of earlier versions, are left out."""
    spent = _spent(lines)
    whole = spent.pop("training") + spent["evaluation"]
    shares = (f"{100 * s / whole:.0f} % {part}" for part, s in spent.items() if s)
    return f"time: {', '.join(shares)}".replace("data_wait", "waiting for data")


def _checkpoints(run: RunFolder) -> str:
    steps = run.steps()
    return f"checkpoints: {', '.join(f'{step:,}' for step in steps[-MOST_SHOWN:]) or 'none yet'}"


def _warnings(run: RunFolder) -> list[str]:
    """The warnings in log.txt: inputs that are not finite, raised dampings, layers without
    statistics, grids that failed."""
    file = run.path / "log.txt"
    return (
        WARNING.findall(file.read_text(encoding="utf-8", errors="replace"))
        if file.is_file()
        else []
    )


def _health(runs: list[RunFolder]) -> list[str]:
    """How many steps and layers of all runs the warnings are about, and how often each occurred,
    the newest last."""
    by_run = [_warnings(run) for run in runs]
    warnings = [line for lines in by_run for line in lines]
    if not warnings:
        return ["health: no warnings"]
    found = [count(len(warnings), "warning")]
    for kind, pattern in KINDS.items():
        named = [{match[1] for match in map(pattern.match, lines) if match} for lines in by_run]
        if number_named := sum(map(len, named)):
            found.append(f"{kind}: {number_named}")
    counts = Counter(warnings)
    shown = list(dict.fromkeys(reversed(warnings)))[:MOST_SHOWN][::-1]
    return [f"health: {'; '.join(found)}", *(f"  {counts[line]} x {line}" for line in shown)]
