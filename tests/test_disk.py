"""Files are whole or not there, and a folder has one process at work."""

import json
import math
import os
import signal
import subprocess
import sys
import threading

import pytest

from flowdopr.disk import OWNER, locked, reading, replacing, to_json, write_bytes, write_text


def test_a_file_is_replaced_whole(tmp_path):
    write_text(tmp_path / "a.txt", "né\n")
    assert (tmp_path / "a.txt").read_bytes() == "né\n".encode()
    write_bytes(tmp_path / "a.txt", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == b"new"


def test_json_is_strict():
    numbers = {"loss": math.inf, "curve": [0.5, (math.nan, -math.inf)]}
    assert json.loads(to_json(numbers), parse_constant=pytest.fail) == {
        "loss": None,
        "curve": [0.5, [None, None]],
    }


@pytest.mark.parametrize(
    "error", [MemoryError("of 8 bytes"), RuntimeError("alloc: can't allocate memory")]
)
def test_a_file_is_not_called_damaged_for_want_of_memory(tmp_path, error):
    with pytest.raises(type(error), match=str(error)), reading(tmp_path / "a.pt", "delete it"):
        raise error


def interrupted(path):
    with replacing(path) as part:
        part.write_text("ne")
        assert path.read_text() == "old"
        raise KeyboardInterrupt


def test_what_fails_half_way_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


HOLD = """
import sys
from pathlib import Path
from flowdopr.disk import locked
with locked(Path(sys.argv[1]), "wait"):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_process(tmp_path):
    """A process that holds the lock of `tmp_path / "run"` until its standard input is closed."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_a_folder_is_locked_as_long_as_the_other_process_lives(tmp_path, other_process, end):
    folder = tmp_path / "run"
    words = f"^{folder}: process {other_process.pid} on .* is at work here; go elsewhere$"
    with pytest.raises(ValueError, match=words), locked(folder, "go elsewhere"):
        pass
    if end == "kill":
        other_process.kill()
    other_process.communicate()
    for _ in range(2):
        with locked(folder, "go elsewhere"):
            assert f"process {os.getpid()} " in (folder / OWNER).read_text()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n\n" * 200])
def test_a_damaged_note_of_who_holds_the_lock_is_one_short_line(tmp_path, other_process, content):
    (tmp_path / "run" / OWNER).write_bytes(content)
    with pytest.raises(ValueError, match=r"is at work here; wait$") as error:
        locked(tmp_path / "run", "wait").__enter__()
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


def test_patience_waits_for_the_other_process(tmp_path, other_process):
    threading.Timer(0.5, other_process.stdin.close).start()
    with locked(tmp_path / "run", "wait", patience=60):
        assert other_process.wait(60) == 0


def test_forked_children_do_not_keep_the_lock(tmp_path, other_process):
    folder = tmp_path / "run"
    other_process.communicate()
    code = HOLD.replace(
        "    sys", "    import os; os.fork() or __import__('time').sleep(60)\n    sys"
    )
    command = [sys.executable, "-c", code, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as process:
        assert process.stdout.readline() == b"locked\n"
        process.kill()
        with locked(folder, "wait", patience=20):
            os.killpg(process.pid, signal.SIGKILL)
