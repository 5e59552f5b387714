"""Runs on disk: the run folder, weight averages, models from other runs, and provenance."""

from flowdopr.runs.averages import OWN, Average, averages_of, file_of
from flowdopr.runs.branch import start_from
from flowdopr.runs.folder import RunFolder, check_same_run
from flowdopr.runs.guide import Guide, load_guide
from flowdopr.runs.initial import load_initial
from flowdopr.runs.provenance import commit, provenance, versions

__all__ = [
    "OWN",
    "Average",
    "Guide",
    "RunFolder",
    "averages_of",
    "check_same_run",
    "commit",
    "file_of",
    "load_guide",
    "load_initial",
    "provenance",
    "start_from",
    "versions",
]
