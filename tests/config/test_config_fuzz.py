"""Whatever bytes a config or an override holds: a config, or one line within a second or so."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flowdopr.cli import run_command
from flowdopr.config import ConfigError, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
TEXTS = [path.read_bytes() for path in sorted(CONFIGS.glob("*.yaml"))]
ODD = [
    *("", "~", "null", "[]", "{}", "!!int ''", "!!set {a}", "!!python/name:os.system", "!x y"),
    *("&a [*a]", "*a", "<<: {a: 1}", "? [a]\n: b", "{[a]: b}", "1: a", "2020-01-01: a", "a: \t b"),
    *("9" * 5000, "-" + "9" * 400, "1e400", ".nan", "-.inf", "0x10", "1_0", "007", "2020-01-01"),
    *("[" * 9000, "{a: " * 9000, "- " * 9000, "[1, " + "2, " * 9000 + "]", "'", '"\\x00"', "|\n x"),
    *("(", "'(a+)+$'", "'(.*)*!'", "((a{1000}){1000}){1000}", "\ufeff", "\0", "\x85", "\ud800"),
    *("base: /dev/zero", "base: .", "base: config.yaml", "base: pipe", "base: " + "x/" * 3000),
]
LONG = [
    *("[" + "1," * 70_000, "".join(f"k{number}: 1\n" for number in range(12_000))),
    *("a: &a [x, x]\n" + "b: [*a, *a]\n" * 9000, "? " * 50_000, "'" * 100_000, "#" * 200_000),
    *("[" + "1," * 49_000 + "]", "a: {" + "".join(f"k{n}: 1, " for n in range(9000)) + "}"),
    "compare: {arms: [" + "{name: a, lrs: [1]}, " * 4500 + "]}",
]
KEYS = ["train.steps", "optimizer", "optimizer.adamw_for", "sample.solver.grid", "compare", "a.b.c"]
quickly = settings(
    max_examples=120,
    deadline=timedelta(seconds=5),  # a hang, not a slow machine
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def path(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "config.yaml"


def message_of(path, overrides):
    try:
        load_config(path, overrides)
    except ConfigError as error:
        return str(error)
    return ""


def loads_or_says_one_line(path, overrides=()):
    message = message_of(path, overrides)
    assert "\n" not in message
    assert len(message) < 10_000


def test_a_base_of_a_long_name_is_one_short_line(path):
    path.write_text(f"base: {'x' * 50_000}")
    loads_or_says_one_line(path)
    assert "a path of 50,000 characters" in message_of(path, ())


@quickly
@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-16")))
@example(b"\xff\xfea\x00")
@example(b"\xef\xbb\xbfname: a")
@example(b"name: caf\xe9")
def test_any_bytes(path, data):
    path.write_bytes(data)
    loads_or_says_one_line(path)


@quickly
@given(st.sampled_from(TEXTS), st.sampled_from(ODD), st.data())
def test_any_change_of_a_real_config(path, text, odd, data):
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(start + 20, len(text))))
    changed = text[:start] + odd.encode("utf-8", "surrogatepass") + text[end:]
    path.write_bytes(changed.replace(b"base: ", b"base: " + bytes(CONFIGS) + b"/"))
    loads_or_says_one_line(path)


@quickly
@given(st.sampled_from(KEYS) | st.text(max_size=30), st.sampled_from(ODD) | st.text(max_size=60))
@example("a." * 5000 + "b", "1")
@example("a\nb", "\ud800")
def test_any_override(key, value):
    loads_or_says_one_line(CONFIGS / "quickstart.yaml", [f"{key}={value}"])


@pytest.mark.parametrize("text", [*ODD, *LONG], ids=range(len(ODD) + len(LONG)))
def test_the_command_ends_with_one_line(path, text, capsys):
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    started = time.process_time()
    assert run_command(["train", str(path), "--print-config"]) == 2
    assert time.process_time() - started < 3  # one second on a common CPU
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("flowdopr: ")
    assert said.err.count("\n") == 1
