"""Where stderr is no terminal, work that takes long says so now and then."""

import time

import pytest

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
