"""Progress: bars in a terminal; elsewhere work that takes long says so now and then."""

import io
import re
import time

import pytest
from rich.console import Console

from flowdopr import terminal


@pytest.fixture
def said(monkeypatch, capsys):
    """Lines that were printed since the last call; one is due every 0.2 seconds."""
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.2)
    return lambda: capsys.readouterr().err.splitlines()


def test_counted_work_is_told_with_its_numbers(said):
    with terminal.heartbeat("flowdopr"), terminal.counting("sampling", 5000, completed=1000) as add:
        add(500)
        add.note("loss 0.5")
        time.sleep(0.5)
    assert set(said()) == {"sampling: 1,500 of 5,000, loss 0.5"}
    time.sleep(0.3)
    assert said() == []


def count_to_2000(shown=True):
    with terminal.counting("sampling", 5000, completed=1000, shown=shown) as add:
        for _ in range(2):
            add(500)
            time.sleep(0.3)
        add.note("loss 0.5")
        time.sleep(0.3)


def test_a_line_has_rate_and_time_left(said):
    with terminal.heartbeat("flowdopr"):
        count_to_2000()
    words = r"sampling: 2,000 of 5,000, [\d.e+]+/s, 0:00:0\d left, loss 0.5"
    assert re.fullmatch(words, said()[-1])


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_in_a_terminal_has_rate_and_time_left(monkeypatch, said, shown):
    seen = io.StringIO()
    console = Console(file=seen, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(terminal, "console", console)
    with terminal.heartbeat("flowdopr"):
        count_to_2000(shown)
    words = r"sampling .* 2000/5000 [\d.e+]+/s 0:00:0\d loss 0.5"
    assert bool(re.search(words, seen.getvalue())) is shown
    assert said() == []


def test_other_work_is_told_by_its_name(said):
    with terminal.heartbeat("flowdopr"):
        with terminal.counting("sampling", 5):
            pass
        time.sleep(0.5)
    lines = said()
    assert lines
    assert all(line.startswith("flowdopr: at work for ") for line in lines)


def test_no_line_is_added_to_those_that_come_often_enough(said):
    with terminal.heartbeat("flowdopr"):
        for number in range(6):
            time.sleep(0.1)
            terminal.print_line(f"step {number}")
    assert said() == [f"step {number}" for number in range(6)]


def test_only_the_first_process_of_a_launch_speaks(said, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with terminal.heartbeat("flowdopr"):
        time.sleep(0.5)
    assert said() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_it_ends_with_its_block(said, error):
    with pytest.raises(error), terminal.heartbeat("flowdopr"):
        raise error
    time.sleep(0.3)
    assert said() == []
