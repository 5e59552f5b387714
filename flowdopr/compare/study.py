"""The results of a study, computed once; the table, plots, report and JSON all show this value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flowdopr.compare.plan import study_path
from flowdopr.compare.results import RunResult
from flowdopr.compare.statistics import ArmSummary, Comparisons, compare_arms, summarise
from flowdopr.compare.verdict import Verdict, build_verdict
from flowdopr.config import Config
from flowdopr.data import DatasetInfo

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = dict(zip("osD^vPX", "●■◆▲▼✚✖", strict=True))
"""Those of matplotlib, and the character that looks like each."""


@dataclass(frozen=True)
class ArmStyle:
    """How an arm is drawn, in every plot and in the table."""

    colour: str
    marker: str
    line: Literal["-", "--"]
    """Solid with activation preconditioning, dashed without."""

    @property
    def glyph(self) -> str:
        return MARKERS[self.marker]


@dataclass(frozen=True)
class Study:
    config: Config
    runs: Sequence[RunResult]
    """In the order in which they were planned."""
    arms: Sequence[ArmSummary]
    metric: str
    """Name of the rollout metric: `FID` in the Inception feature space, `FD` in any other."""
    comparisons: Comparisons
    verdict: Verdict
    styles: dict[str, ArmStyle]
    """By the arm's name."""

    @property
    def dataset(self) -> DatasetInfo | None:
        """The data set of all runs, once one of them is finished."""
        return next((run.dataset for run in self.runs if run.dataset), None)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def folder(self) -> Path:
        return study_path(self.config)


def build_study(config: Config, runs: Sequence[RunResult]) -> Study:
    """Compute everything that the report shows about `runs`."""
    arms = summarise(runs)
    metric = next((run.metric for run in runs if run.final), "FD")
    comparisons = compare_arms(metric, arms)
    verdict = build_verdict(metric, runs, arms, comparisons)
    return Study(config, runs, arms, metric, comparisons, verdict, arm_styles(arms))


def arm_styles(arms: Sequence[ArmSummary]) -> dict[str, ArmStyle]:
    """A style for each arm; from the eighth arm on, colours repeat with other markers."""
    styles, markers = {}, list(MARKERS)
    for index, arm in enumerate(arms):
        colour = COLOURS[index % len(COLOURS)]
        marker = markers[(index + index // len(COLOURS)) % len(markers)]
        styles[arm.name] = ArmStyle(colour, marker, "-" if arm.plan.dopr else "--")
    return styles
