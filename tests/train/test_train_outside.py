"""Runs with optimizers of other packages, which may average the weights themselves."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from tiny import again, assert_equal, tiny, weights

from flowdopr.cli import run_command
from flowdopr.config import ConfigError
from flowdopr.runs.folder import RunFolder
from flowdopr.train import Interrupted, train

FREE = "schedulefree.AdamWScheduleFree"
UNET = (
    "model={name: unet, channels: 8, channel_multipliers: [1], num_res_blocks: 1, "
    "attention_resolutions: []}"
)


def outside(class_path, lr=3e-3, dopr=False, **options):
    chosen = f"name: outside, class_path: {class_path}, lr: {lr}, options: {json.dumps(options)}"
    if dopr:
        chosen += ", dopr: {damping: 1}"  # constant, whatever the number of steps
    averages = ["train.ema_decays=[]"] if "ScheduleFree" in class_path else []
    return [f"optimizer={{{chosen}}}", *averages]


def assert_same(run, other, step):
    for file in sorted((run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")):
        assert_equal(weights(run, step, file.stem), weights(other, step, file.stem))
    states = [RunFolder.open(path).load_state(step) for path in (run, other)]
    assert_equal(*states)


@pytest.mark.parametrize("model", ["dit", pytest.param("unet", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dopr", [False, True])
@pytest.mark.parametrize(
    ("class_path", "lr"),
    [
        (FREE, 3e-3),
        ("schedulefree.SGDScheduleFree", 1.0),
        ("schedulefree.RAdamScheduleFree", 3e-3),
        ("prodigyopt.Prodigy", 1.0),
        ("pytorch_optimizer.Lion", 1e-3),
        ("pytorch_optimizer.AdaFactor", 1e-2),
        ("pytorch_optimizer.SOAP", 3e-3),
    ],
)
def test_a_resumed_run_equals_the_straight_one(tmp_path, class_path, lr, dopr, model):
    settings = [*outside(class_path, lr, dopr), *([UNET] if model == "unet" else [])]
    config = tiny(tmp_path, *settings, "train.steps=20", "train.validate_every=3")
    straight = train(again(config, "name=straight"))
    train(again(config, "name=cut", "train.steps=7"))
    assert_same(straight, train(again(config, "name=cut"), resume=True), 20)
    losses = [line["loss"] for line in RunFolder.open(straight).metrics() if "loss" in line]
    assert losses[-1] < losses[0]


def test_a_run_that_is_interrupted_goes_on_bitwise(tmp_path):
    settings = [*outside(FREE, dopr=True), "train.validate_every=2", "train.checkpoint_every=5"]
    config = tiny(tmp_path, *settings, "name=stopped", "train.steps=100000")
    run = tmp_path / "runs" / "stopped"

    def stop_after_a_checkpoint() -> None:
        while not list(run.glob("checkpoints/step-????????")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_after_a_checkpoint, daemon=True).start()
    with pytest.raises(Interrupted):
        train(config)
    total = RunFolder.open(run).steps()[-1] + 6
    train(again(config, f"train.steps={total}"), resume=True)
    assert_same(train(again(config, "name=straight", f"train.steps={total}")), run, total)


def test_the_optimizers_own_average_is_what_is_validated_and_sampled(tmp_path, capsys):
    config = tiny(tmp_path, *outside(FREE, warmup_steps=3), "evaluate.metrics=[spectrum]",
                  "evaluate.fid_num_images=8", "train.validate_every=4")  # fmt: skip
    path = train(config)
    run = RunFolder.open(path)
    raw, own = weights(path, 8), weights(path, 8, "own")
    state = run.load_state(8)["optimizer"]["state"]
    names = [name for name, _ in run.load_model()[0].named_parameters()]
    for name, of_parameter in zip(names, state.values(), strict=True):
        x = raw[name].double().lerp(of_parameter["z"].double(), 1 - 1 / 0.9)
        torch.testing.assert_close(own[name].double(), x, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(raw[name], own[name]) for name in raw)
    assert_equal(dict(run.load_model()[0].state_dict()), own)
    validated = [line["held_out_loss"] for line in run.metrics() if "held_out_loss" in line][-1]
    assert run_command(["evaluate", str(path)]) == 0
    card = json.loads(next((path / "evaluation").glob("*.json")).read_text())
    assert card["metrics"]["one_step_loss"] == pytest.approx(validated, rel=1e-6)
    sample = ["sample", str(path), "--num", "4", "--out"]
    for chosen in ("ema", "own", "raw"):
        assert run_command([*sample, str(tmp_path / chosen), "--weights", chosen]) == 0
    images = [(tmp_path / name / "000000-0.png").read_bytes() for name in ("ema", "own", "raw")]
    assert images[0] == images[1] != images[2]
    assert run_command([*sample, str(tmp_path / "x"), "--weights", "ema-0.9"]) == 2
    assert "no weights 'ema-0.9'; there are: raw, ema, own" in capsys.readouterr().err
    started = train(tiny(tmp_path, "name=next", f"train.init_from={path}", "train.steps=1"))
    assert "own.safetensors" in (started / "versions.json").read_text()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ([*outside(FREE), "train.ema_decays=[0.9]"],
         r"train.ema_decays: schedulefree.AdamWScheduleFree averages .* set train.ema_decays=\[\]"),
        ([*outside(FREE), "train.ema_lengths=[0.1]"], r"set train.ema_lengths=\[\]"),
        ([*outside("torch.optim.RAdam"), "train.ema_decays=[]"],
         "both empty, and torch.optim.RAdam does not average the weights itself: give one"),
    ],
)  # fmt: skip
def test_either_the_run_averages_the_weights_or_its_optimizer_does(tmp_path, settings, line):
    with pytest.raises(ConfigError, match=line):
        train(tiny(tmp_path, *settings))
    assert not (tmp_path / "runs").exists()


def test_reading_a_run_imports_no_optimizer(tmp_path):
    path = train(tiny(tmp_path, *outside("pytorch_optimizer.Lion"), "train.steps=1"))
    code = (
        "import sys; from flowdopr.cli import run_command\n"
        f"assert run_command(['sample', {str(path)!r}, '--num', '1', '--out', {str(tmp_path)!r}"
        " + '/drawn']) == 0\nassert 'pytorch_optimizer' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    config = path / "config.yaml"
    _, text = config.read_text().split("\n", 1)  # without the checksum
    config.write_text(text.replace("pytorch_optimizer.Lion", "antigravity.Lion"))
    with pytest.raises(ConfigError, match="must be PACKAGE"):
        RunFolder.open(path)
