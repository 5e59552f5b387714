"""docs/settings.md is what the schema says today, and says something about every setting."""

import doctest
import re
import sys
from pathlib import Path

import pytest
from script_modules import load_script

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "settings.md"
SECTION = "a name, or a section"  # its names are explained in a table of their own


@pytest.fixture(scope="module")
def script():
    return load_script("write_settings.py")


def test_the_reference_is_current(script):
    hint = "run: python scripts/write_settings.py"
    assert DOCUMENT.read_text(encoding="utf-8") == script.settings_markdown(), hint


def test_every_setting_has_a_meaning(script):
    lines = script.settings_markdown().splitlines()
    rows = [re.split(r" (?<!\\)\| ", line.strip("| ") + " ") for line in lines if "| `" in line]
    assert len(rows) > 120
    for row in rows:
        assert row[-1].strip() or SECTION in row, row[0]


def test_help_writes_nothing(script, monkeypatch):
    before = DOCUMENT.stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["write_settings.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        script.main()
    assert DOCUMENT.stat().st_mtime_ns == before


def test_arguments_are_read_from_docstrings(script):
    assert doctest.testmod(script).failed == 0
    assert script.arguments_of(lambda: 0) == {}
