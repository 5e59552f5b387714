"""The run folder: what it refuses, what it deletes, what it keeps, and what a crash may leave."""

from dataclasses import replace

import pytest
import torch
from stored import INFO, save

from flowdopr.config import ConfigError
from flowdopr.runs import RunFolder
from flowdopr.runs.provenance import with_earlier


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ([], [1, 2, 3, 4, 5, 6, 7]),
        (["train.keep_checkpoints=2"], [6, 7]),
        (["train.keep_checkpoints=1", "train.keep_every=3"], [3, 6, 7]),
        (["train.keep_checkpoints=1", "train.keep_best=true", "train.validate_every=1"], [2, 7]),
    ],
)
def test_checkpoints_are_kept_by_a_rule(create, rule, kept):
    run = create(*rule)
    for step in range(1, 8):
        save(run, step)
        run.append_metrics({"step": step, "held_out_loss": abs(step - 2.25)})
    assert run.steps() == kept
    assert not (run.path / "averages").exists()


@pytest.mark.parametrize(
    "setting", ["keep_every=3", "keep_best=true", "keep_checkpoints=2 keep_best=true"]
)
def test_a_rule_that_keeps_nothing_more_is_refused(create, setting):
    with pytest.raises(ConfigError, match=r"train\.keep_\w+=.* is not used .*: remove it"):
        create(*(f"train.{one}" for one in setting.split()))


LENGTHS = "train.ema_lengths=[0.05, 0.1]"


def test_deleted_checkpoints_leave_their_power_averages_for_post_hoc_ones(create):
    every = save(create(LENGTHS, "name=every"), *range(1, 9))
    few = save(create(LENGTHS, "train.keep_checkpoints=2"), *range(1, 9))
    assert few.steps() == [7, 8]
    assert files_in(few.path / "averages") == {
        f"step-{step:08d}/{name}"
        for step in range(1, 7)
        for name in ("checkpoint.json", "power-0.05.safetensors", "power-0.1.safetensors")
    }
    found, expected = (run.load_weights(8, "posthoc-0.14")["w"] for run in (few, every))
    assert torch.equal(found, expected)
    with pytest.raises(ConfigError, match=r"weights posthoc-0\.02: 16 stored averages up to"):
        few.load_weights(8, "posthoc-0.02")


def test_a_deletion_that_a_crash_cut_short_is_completed(create):
    run = save(create(LENGTHS, "train.keep_checkpoints=1"), 1)
    (run.path / "checkpoints" / "step-00000001").rename(
        run.path / "checkpoints" / "step-00000001.deleted"
    )
    assert run.steps() == []
    save(run, 2)
    assert [folder.name for folder in (run.path / "checkpoints").iterdir()] == ["step-00000002"]
    assert [folder.name for folder in (run.path / "averages").iterdir()] == ["step-00000001"]


def test_post_hoc_averages_need_stored_lengths(create):
    with pytest.raises(ConfigError, match=r"posthoc-0.1 needs a run with train.ema_lengths"):
        save(create(), 8).load_weights(8, "posthoc-0.1")


def test_weights_and_checkpoints_that_are_not_there_are_named(create):
    run = create()
    with pytest.raises(ConfigError, match="this run has no checkpoint yet"):
        run.load_model()
    save(run, 4, 8)
    with pytest.raises(ConfigError, match="no checkpoint at step 5; there are: 4, 8"):
        run.load_model(5)
    with pytest.raises(ConfigError, match=r"no weights 'ema-0\.5'; there are: raw, ema, ema-0"):
        run.load_weights(8, "ema-0.5")
    assert run.load_weights(4, "raw")["w"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.lr=0.25", r"optimizer\.lr was .*, now 0\.25; choose another folder by name="),
        ("data.horizontal_flip=true", "data.horizontal_flip was False, now True"),
    ],
)
def test_a_run_of_other_settings_is_not_resumed(create, change, message):
    save(create(), 4)
    with pytest.raises(ConfigError, match=message):
        create(change, resume=True)


def test_a_run_of_other_images_is_not_resumed(create):
    save(create(), 4)
    other = replace(INFO, fingerprint="1" * 64)
    with pytest.raises(
        ConfigError, match=r"the images in .* are not those this run was trained on"
    ):
        create(resume=True, info=other)


def test_settings_that_do_not_change_the_weights_may_change(create):
    save(create(), 4)
    run = create("train.steps=20", "train.log_every=3", "sample.num_images=4", resume=True)
    assert RunFolder.open(run.path).config == run.config


def test_a_run_with_a_checkpoint_is_not_overwritten(create):
    create()
    save(create("optimizer.lr=0.25"), 4)  # there was no checkpoint yet
    with pytest.raises(ConfigError, match="a run is here already; go on with it by --resume"):
        create("optimizer.lr=0.25")


def test_a_run_folder_leads_to_no_config_outside_it(create, tmp_path):
    run = create()
    (tmp_path / "other.yaml").write_text("seed: 3\n")
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(f"base: {tmp_path}/other.yaml\n{text}")
    with pytest.raises(ConfigError, match=r"config.yaml: base: this file must stand alone; write"):
        RunFolder.open(run.path)


def test_a_folder_of_something_else_is_refused(create, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"run: the folder has files but is not a run; choose"):
        create()
    assert files_in(tmp_path) == {"run/thesis.tex"}


def test_resuming_deletes_the_metrics_after_the_newest_checkpoint(create):
    run = save(create(), 2, 4)
    run.append_metrics({"step": 5})
    with open(run.path / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 6, "lo')
    assert [line["step"] for line in run.metrics()] == [2, 4, 5]
    assert [line["step"] for line in create(resume=True).metrics()] == [2, 4]


def test_versions_of_a_finished_run_stay(create):
    before = save(create(), 8).made_by()
    assert create(resume=True, commit="new").made_by() == before


def test_versions_name_what_each_range_of_steps_was_made_with():
    first = with_earlier({"commit": "a"}, {}, 0)
    assert first == {"commit": "a", "from_step": 0, "earlier": []}
    second = with_earlier({"commit": "b"}, first, 3)
    assert [entry["commit"] for entry in second["earlier"]] == ["a"]
    # Resumed at step 3 again: nothing that the second one trained is left.
    third = with_earlier({"commit": "c"}, second, 3)
    assert (third["from_step"], [entry["commit"] for entry in third["earlier"]]) == (3, ["a"])
    assert all("earlier" not in entry for entry in third["earlier"])
