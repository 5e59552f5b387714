"""A study made twice gives the same numbers, an arm made twice is level with itself, and runs that
are there are used again."""

import json
import re

import pytest

from flowdopr.cli import run_command
from flowdopr.compare import compare
from flowdopr.compare.plan import expand
from flowdopr.config import ConfigError, apply_overrides, to_yaml
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
    folder = compare(config)
    found = results(folder)
    one, other = (folder / "table.tex").read_text().splitlines()[4:6]
    assert one.count("textbf") == other.count("textbf") > 0  # both are the best
    (claim,) = found["claims"]
    assert set(claim["by_seed"].values()) == {1.0}
    assert (claim["ratio"], claim["interval"], claim["p_holm"]) == (1.0, [1.0, 1.0], 1.0)
    assert not claim["shown"]
    headline = found["verdict"]["headline"]
    assert headline.startswith("one and other share the lowest mean FD, ")
    assert "The mean one-step loss of all is the same" in headline
    assert "warning" not in capsys.readouterr().err.lower()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["compare.seeds=[]"], r"compare\.seeds: must have at least 1 item"),
        (["evaluate.metrics=[fd, fdd]"], r"evaluate\.metrics.*did you mean 'fd'"),
        (["evaluate.fid_num_images=1"], r"evaluate\.fid_num_images: must be greater"),
        (["evaluate.extractor=dinov2"], r"evaluate\.extractor\.weights: missing"),
        (
            ["evaluate.extractor=inception", "evaluate.extractor.weights=no.pth"],
            r"evaluate\.extractor\.weights: there is no file 'no\.pth'",
        ),
        (["data.name=folder", "data.root=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused_before_any_run(small, tmp_path, capsys, changes, words):
    config = tmp_path / "small.yaml"
    config.write_text(to_yaml(small))
    assert run_command(["compare", str(config), *changes]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("flowdopr: ")
    assert re.search(words, line)
    assert not any(plan.path.exists() for plan in expand(small))


@pytest.mark.slow
def test_changed_images_and_edited_configs_are_refused(small, tmp_path, write_images, capsys):
    images = write_images(tmp_path / "images", {"cat": 30, "dog": 30})
    data = ["data.name=folder", f"data.root={images}", "data.image_size=8"]
    config = apply_overrides(small, [*data, f"{SAME_ARMS}]", "compare.seeds=[0]"])
    compare(config)
    plan = expand(config)[0]
    write_images(images, {"cat": 31})
    more = apply_overrides(config, ["compare.seeds=[0, 1]"])
    with pytest.raises(ConfigError, match=r"one-lr0\.001-s0: the images in .* are not those"):
        compare(more)
    assert not any(plan.path.exists() for plan in expand(more) if plan.seed == 1)
    text = (plan.path / "config.yaml").read_text().replace("depth: 1", "depth: 2")
    without_checksum = text.partition("\n")[2]
    for edited, said in ((text, "is damaged"), (without_checksum, r"model\.depth was 2, now 1")):
        (plan.path / "config.yaml").write_text(edited)
        with pytest.raises(ValueError, match=said) as caught:
            compare(config)
        assert "\n" not in str(caught.value)
