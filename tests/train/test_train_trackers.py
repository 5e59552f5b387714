"""What trackers show of a run, read back from the files that they write without a network."""

import json
import os
import sqlite3
import struct
from pathlib import Path

import pytest
from tiny import again, assert_same_checkpoint, tiny, without_times

from flowdopr.cli import run_command
from flowdopr.runs import RunFolder
from flowdopr.train import train

LOOKS = ["train.validate_every=4", "train.checkpoint_every=4", "train.sample_every=4"]


@pytest.fixture(autouse=True)
def _without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def expected(run):
    """Every number of metrics.jsonl, by its key and step."""
    lines = RunFolder.open(run).metrics()
    return {(key, line["step"]): line[key] for line in lines for key in line if key != "step"}


def read_tensorboard(run):
    """Numbers by key and step, the steps of grids, the config and the names under which the run is
    known, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # pyright: ignore

    place = run / "tensorboard" / "flowdopr"
    found = EventAccumulator(str(place)).Reload()
    tags = found.Tags()
    numbers = {(tag, e.step): e.value for tag in tags["scalars"] for e in found.Scalars(tag)}
    file = next(place.glob("*/events*"))
    start = EventAccumulator(str(file)).Reload().SummaryMetadata("_hparams_/session_start_info")
    given = HParamsPluginData.FromString(start.plugin_data.content).session_start_info.hparams
    config = {key: one.number_value or one.string_value for key, one in given.items()}
    return numbers, {e.step for e in found.Images("samples")}, config, {place.name}


def read_wandb(run):
    """The same of W&B's files of all launches; the names are the ids that it would sync to."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore

    numbers, grids, config, ids = {}, set(), {}, set()
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for content in records(file.read_bytes()):
            record = Record.FromString(content)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            for item in [*record.run.config.update, *record.config.update]:
                config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            items = record.history.item
            line = {one.key or one.nested_key[0]: json.loads(one.value_json) for one in items}
            step = line.get("_step", record.history.step.num)
            grids |= {step} if "samples" in line else set()
            kept = (key for key in line if not key.startswith("_") and key != "samples")
            numbers |= {(key, step): line[key] for key in kept}
    return numbers, grids, config, ids


def records(content):
    """The records of a file in LevelDB's log format, behind W&B's header of 7 bytes."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the full record, or its last part
            yield whole
            whole = b""


def read_trackio(_):
    """The same of trackio's data base."""
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "flowdopr.db") as base:
        lines = base.execute("select step, metrics from metrics").fetchall()
        config = json.loads(base.execute("select config from configs").fetchone()[0])
        names = {name for (name,) in base.execute("select distinct run_name from metrics")}
    lines = [(step, json.loads(line)) for step, line in lines]
    numbers = {(k, step): line[k] for step, line in lines for k in line if k != "samples"}
    return numbers, {step for step, line in lines if "samples" in line}, config, names


@pytest.mark.parametrize(
    ("name", "read"),
    [("tensorboard", read_tensorboard), ("wandb", read_wandb), ("trackio", read_trackio)],
)
def test_numbers_grids_and_config_of_two_launches_are_shown_as_one_run(tmp_path, name, read):
    pytest.importorskip(name)
    plain = train(tiny(tmp_path, "name=plain", *LOOKS))
    config = tiny(tmp_path, f"train.trackers=[{name}]", *LOOKS)
    train(again(config, "train.steps=4"))
    run = train(config, resume=True)
    assert_same_checkpoint(plain, run, 8)
    assert without_times(plain) == without_times(run)
    numbers, grids, settings, names = read(run)
    wanted = expected(run)
    assert {("loss", 2), ("held_out_loss", 4), ("loss", 8), ("forward", 8)} <= wanted.keys()
    assert numbers == pytest.approx(wanted)
    assert grids == {4, 8}
    assert settings["optimizer.lr"] == 3e-3
    assert len(names) == 1


def test_steps_that_are_trained_again_are_shown_once(tmp_path):
    config = tiny(tmp_path, "train.trackers=[tensorboard]", *LOOKS)
    run = train(config)
    for folder in ("checkpoints", "samples"):
        for item in (run / folder).glob("step-00000008*"):
            item.rename(tmp_path / f"{folder}-of-step-8")
    train(config, resume=True)
    numbers, grids, *_ = read_tensorboard(run)
    assert numbers == pytest.approx(expected(run))
    assert grids == {4, 8}


def test_a_new_run_in_an_old_folder_is_another_run(tmp_path):
    config, ids = tiny(tmp_path, "train.trackers=[tensorboard]", "train.steps=1"), []
    for text in ("../elsewhere", None):
        run = train(config, resume=bool(ids))
        ids.append((run / "tracker-id").read_text())
        if text:  # a stranger may have written anything
            (run / "tracker-id").write_text(text)
    assert len(set(ids)) == 2
    assert all(len(one.strip()) == 8 for one in ids)


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    run = train(tiny(tmp_path, "train.trackers=[tensorboard]"))
    said = (run / "log.txt").read_text()
    assert said.count("train.trackers: tensorboard: ") == 1
    assert "No space left on device; the run goes on without it" in said
    assert RunFolder.open(run).steps() == [8]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("trackio", "train.trackers: trackio is not installed: pip install trackio"),
        ("mlflow", "train.trackers: mlflow is not one of tensorboard, wandb, trackio"),
    ],
)
def test_trackers_that_cannot_be_used_are_refused_at_the_start(
    tmp_path, monkeypatch, capsys, setting, words
):
    monkeypatch.setattr("flowdopr.train.trackers.get_available_trackers", list)
    tiny(tmp_path)
    given = [f"output={tmp_path}/runs", f"train.trackers=[{setting}]"]
    assert run_command(["train", str(tmp_path / "tiny.yaml"), *given]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
