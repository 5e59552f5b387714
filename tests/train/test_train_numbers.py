"""Numbers that are not finite: the step is skipped without a trace, and too many end the run."""

import json
import shutil

import poison as poisoning
import pytest
import torch
from poison import LAYER, poison
from tiny import again, assert_equal, assert_same_checkpoint, start_two, tiny, tiny_file, weights

from flowdopr.cli import run_command
from flowdopr.runs import RunFolder
from flowdopr.train import start, train
from flowdopr.train.signals import TRY
from flowdopr.train.spikes import FEWEST, Spikes

EVERY = ["train.checkpoint_every=1", "train.log_every=1"]
DOPR = ["optimizer.name=dopr-muon", "optimizer.dopr.refresh_every=1"]


@pytest.fixture
def spoilt(monkeypatch):
    """See `poison`; undone after the test."""
    monkeypatch.setattr(start, "build_components", start.build_components)
    return poison


def assert_untouched(run, step):
    """The step after `step` left weights, averages and optimizer state as they were."""
    for name in ("model", "ema-0.9"):
        assert_equal(weights(run, step, name), weights(run, step + 1, name))
    before, after = (RunFolder.open(run).load_state(number) for number in (step, step + 1))
    assert_equal(before["optimizer"], after["optimizer"])


def skipped(run):
    return [(line["step"], line["skipped"]) for line in run.metrics() if "skipped" in line]


@pytest.mark.parametrize("settings", [[], ["train.max_grad_norm=null"], DOPR], ids=str)
@pytest.mark.parametrize("kind", ["output", "loss", "gradient"])
def test_a_step_that_is_not_finite_leaves_no_trace(tmp_path, spoilt, kind, settings):
    spoilt(kind, {0, 3})
    run = RunFolder.open(train(tiny(tmp_path, *settings, *EVERY)))
    assert skipped(run) == [(1, 1), (4, 2)]
    assert_untouched(run.path, 3)
    logged = [line["step"] for line in run.metrics() if "loss" in line]
    assert logged == [2, 3, 5, 6, 7, 8]
    assert (run.path / "log.txt").read_text().count("the step is skipped") == 2
    assert not torch.equal(*(weights(run.path, step)["final.weight"] for step in (4, 5)))


@pytest.mark.parametrize("settings", [[], DOPR], ids=str)
def test_a_run_with_skipped_steps_resumes_bitwise(tmp_path, spoilt, settings):
    spoilt("output", {0, 3, 4})
    config = tiny(tmp_path, *settings, "train.checkpoint_every=1", "train.log_every=4")
    straight, cut = (train(again(config, f"name={name}")) for name in ("straight", "cut"))
    for step in (5, 6, 7, 8):  # from step 4, between two that are skipped
        shutil.rmtree(cut / "checkpoints" / f"step-{step:08d}")
    train(again(config, "name=cut"), resume=True)
    assert_same_checkpoint(straight, cut, 8)
    assert skipped(RunFolder.open(straight)) == skipped(RunFolder.open(cut))
    losses = [
        [line.get("loss") for line in RunFolder.open(run).metrics()] for run in (straight, cut)
    ]
    assert losses[0] == losses[1]


CAUSES = {
    "output": f"step 6: the output of layer '{LAYER}' is not finite; ",
    "loss": "step 6: the loss is inf, though the outputs of all layers are finite; ",
    "gradient": "step 6: the gradient of ",
}


@pytest.mark.parametrize("kind", CAUSES)
def test_too_many_in_a_row_end_the_run_and_name_the_layer(tmp_path, spoilt, capfd, kind):
    spoilt(kind, {0, 3, 4, 5})
    path, shared = tiny_file(tmp_path, "train.checkpoint_every=3", "train.max_skipped_steps=3")
    assert run_command(["train", str(path), *shared]) == 1
    line = capfd.readouterr().err.strip().split("\n")[-1]
    run = f"{tmp_path}/runs/tiny"
    assert line.startswith(f"flowdopr: {run}: the loss or the gradient was not finite on 3 steps")
    assert CAUSES[kind] in line
    assert f"newest sound checkpoint: {run}/checkpoints/step-00000003; " in line
    assert run_command(["train", str(path), *shared, "--resume"]) == 1
    assert capfd.readouterr().err.strip().split("\n")[-1] == line


def test_a_run_that_diverged_before_its_first_checkpoint_says_so(tmp_path, capfd):
    diverging = ["optimizer.name=sgd", "optimizer.lr=1e30", "train.max_grad_norm=null"]
    path, shared = tiny_file(tmp_path, *diverging, "train.steps=20")
    assert run_command(["train", str(path), *shared]) == 1
    line = capfd.readouterr().err.strip().split("\n")[-1]
    assert "up to step 11: the loss is inf, though" in line
    assert line.endswith("newest sound checkpoint: none; " + TRY)


@pytest.mark.slow
def test_all_processes_skip_what_one_cannot_use(tmp_path):
    """The loss of process 1 alone overflows, from step 3 on."""
    spoiling = json.dumps({"kind": "loss", "steps": [1, *range(3, 20)], "rank": 1})
    settings = ["train.max_skipped_steps=2", "train.steps=20", *EVERY]
    path, shared = tiny_file(tmp_path, *settings)
    processes = start_two(poisoning.__file__, spoiling, "train", str(path), *shared)
    said = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    run = RunFolder.open(tmp_path / "runs" / "tiny")
    assert skipped(run) == [(2, 1), (4, 2), (5, 3)]
    assert_untouched(run.path, 3)
    assert sum(text.count("the loss is inf, though") for text in said) == 1
    assert not any("Traceback" in text for text in said)


def test_half_precision_skips_by_the_same_rule_and_lowers_its_scale(tmp_path, monkeypatch):
    """On a CPU, where accelerate would not do it: a scale of the loss under which the gradients
    overflow."""
    make = start.make_accelerator

    def halved(config):
        accelerator = make(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        return accelerator

    monkeypatch.setattr(start, "make_accelerator", halved)
    run = RunFolder.open(
        train(tiny(tmp_path, *EVERY, "train.steps=200", "train.max_skipped_steps=200"))
    )
    first = skipped(run)
    scale = run.load_state(200)["scaler"]["scale"]
    assert scale == 2.0 ** (126 - len(first))
    assert 1 < len(first) < 150
    assert_untouched(run.path, 1)


def test_losses_that_stand_out_are_logged_in_one_line():
    assert Spikes().among([1.0, 50.0]) == ""  # too few before
    spikes = Spikes()
    assert spikes.among([1.0 + 0.01 * (i % 3) for i in range(FEWEST)]) == ""
    assert spikes.among([1.09, 0.2]) == ""
    line = spikes.among([1.0, 1.2, 3.0])
    assert line == "2 of the last 3 losses above 1.111, up to 3; the 34 before have median 1.01"


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
def test_workers_change_no_number(tmp_path, write_images):
    write_images(tmp_path / "images", {"one": 30, "two": 30})
    data = ["data.name=folder", f"data.root={tmp_path}/images", "data.horizontal_flip=true"]
    runs = [
        train(tiny(tmp_path, *data, *EVERY, f"data.num_workers={workers}", f"name=w{workers}"))
        for workers in (0, 2)
    ]
    assert_same_checkpoint(*runs, 8)
    losses = [[line.get("loss") for line in RunFolder.open(run).metrics()] for run in runs]
    assert losses[0] == losses[1]
