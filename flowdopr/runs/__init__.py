"""Runs on disk: the run folder, weight averages, models from other runs, and provenance."""

from flowdopr.runs.averages import OWN, Average, averages_of, file_of
from flowdopr.runs.begin import begin_run, check_no_links, check_place
from flowdopr.runs.branch import start_from
from flowdopr.runs.checkpoint import kept_steps
from flowdopr.runs.exported import open_run, write_exported
from flowdopr.runs.folder import RunFolder
from flowdopr.runs.guide import Guide, load_guide
from flowdopr.runs.initial import load_initial
from flowdopr.runs.provenance import commit, provenance, versions
from flowdopr.runs.same import check_same_run

__all__ = [
    "OWN",
    "Average",
    "Guide",
    "RunFolder",
    "averages_of",
    "begin_run",
    "check_no_links",
    "check_place",
    "check_same_run",
    "commit",
    "file_of",
    "kept_steps",
    "load_guide",
    "load_initial",
    "open_run",
    "provenance",
    "start_from",
    "versions",
    "write_exported",
]
