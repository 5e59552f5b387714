"""A study made twice gives the same numbers, an arm made twice is level with itself, and runs that
are there are used again."""

import json

import pytest

from flowdopr.compare import compare
from flowdopr.compare.plan import expand
from flowdopr.config import apply_overrides
from flowdopr.evaluate import classifier

MEASURED = (
    *("seconds_per_step", "peak_memory_bytes", "hardware", "commit", "versions", "sample_grid"),
    *("path", "config", "gallery", "launched", "p_holm", "pairs"),
)
"""Fields that depend on the machine or the time, and those that depend on FD at equal time."""
SAME_ARMS = "compare.arms=[{name: one, lrs: [1e-3]}, {name: other, lrs: [1e-3]}"


def numbers(value):
    """`value` without the measured fields and claims at equal time."""
    if isinstance(value, dict):
        return {key: numbers(inner) for key, inner in value.items() if key not in MEASURED}
    if isinstance(value, list):
        return [
            numbers(inner)
            for inner in value
            if not (isinstance(inner, dict) and "time" in inner.get("measure", ""))
        ]
    return value


def results(folder):
    def refuse(text):
        raise AssertionError(f"{text} in results.json")

    return json.loads((folder / "results.json").read_text(), parse_constant=refuse)


def stamps(plans):
    files = [file for plan in plans for file in plan.path.rglob("*") if file.is_file()]
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


@pytest.fixture
def small(study, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWDOPR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "STEPS", 5)
    changes = ["compare.nfe_steps=[]", "train.steps=4", "train.checkpoint_every=2"]
    return apply_overrides(study, changes)


def test_a_study_made_twice_gives_the_same_numbers_and_goes_on_with_its_runs(small, tmp_path):
    folder = compare(small)
    again = compare(apply_overrides(small, [f"output={tmp_path / 'again'}"]))
    assert numbers(results(again)) == numbers(results(folder))

    before = stamps(expand(small))
    more = "[{name: AdamW, lrs: [1e-3]}, {name: DoPr-AdamW, lrs: [1e-3], set: {optimizer.name: "
    more += "dopr-adamw}}, {name: new, lrs: [1e-2]}]"
    compare(apply_overrides(small, [f"compare.arms={more}", "compare.seeds=[0, 1, 2]"]))
    assert stamps(expand(small)) == before
    assert len(results(folder)["runs"]) == 9


def test_an_arm_against_itself_is_level(small, capsys):
    config = apply_overrides(small, [f"{SAME_ARMS}]", "compare.seeds=[0, 1, 2]"])
    found = results(compare(config))
    (claim,) = found["claims"]
    assert set(claim["by_seed"].values()) == {1.0}
    assert (claim["ratio"], claim["interval"], claim["p_holm"]) == (1.0, [1.0, 1.0], 1.0)
    assert not claim["shown"]
    headline = found["verdict"]["headline"]
    assert headline.startswith("one and other share the lowest mean FD, ")
    assert "The mean one-step loss of all is the same" in headline
    assert "warning" not in capsys.readouterr().err.lower()
