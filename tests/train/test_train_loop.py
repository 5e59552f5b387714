"""What a run leaves behind, and the settings that shape its steps."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny import again, tiny, weights

import flowdopr
from flowdopr.cli import run_command
from flowdopr.config import ConfigError, to_yaml
from flowdopr.runs.folder import RunFolder
from flowdopr.train import TrainingFailed, train
from flowdopr.train.meter import DATA, FORWARD, PARTS, Meter
from flowdopr.train.schedule import lr_factor


def test_a_run_leaves_everything_its_readers_need(tmp_path):
    path = train(tiny(tmp_path, "train.checkpoint_every=3", "train.validate_every=4"))
    run = RunFolder.open(path)
    assert run.steps() == [3, 6, 8]
    logged = [line for line in run.metrics() if "loss" in line]
    assert [line["step"] for line in logged] == [2, 4, 6, 8]
    assert all(line["seconds_per_step"] > 0 for line in logged)
    assert all(0 < line[part] < 1 for line in logged for part in PARTS)
    assert logged[-1]["images"] == 8 * 16
    looks = [line for line in run.metrics() if "loss" not in line]
    held_out = {line["step"]: line["held_out_loss"] for line in looks}
    assert list(held_out) == [4, 8]
    assert all(line["evaluation_seconds"] > 0 for line in looks)
    assert 0 < held_out[8] < 3
    with Image.open(path / "samples" / "step-00000008.png") as grid:
        assert grid.size == (70, 70)
    versions = json.loads((path / "versions.json").read_text())
    assert versions["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "blocks.0.attention.qkv.weight" in (path / "log.txt").read_text()
    assert (path / "config.yaml").read_text().endswith(f"\n{to_yaml(run.config)}")


def test_parts_of_a_step_are_shares_of_the_measured_time(monkeypatch):
    """The second window lasts 8 s, of which 3 were spent waiting; pauses do not count."""
    accelerator, clock = Accelerator(cpu=True), iter([0, 0, 0, 2, 2, 3, 6, 7, 17, 20, 20])
    timer = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr("flowdopr.train.meter.time", timer)
    meter = Meter(accelerator)
    shares = []
    for _ in range(2):
        with meter.part(DATA):
            pass
        meter.add(torch.zeros(()))
        if shares:
            meter.pause()
            meter.go_on()
        shares.append(meter.close(meter.state(), 16)["data_wait"])
    assert shares == [0, 3 / 8]


@pytest.mark.gpu
def test_on_a_gpu_a_part_is_the_time_of_the_device():
    meter = Meter(Accelerator())
    for _ in range(2):
        with meter.part(FORWARD):
            torch.cuda._sleep(10**8)  # clock cycles, for which the host does not wait
        with meter.part(DATA):
            pass
        meter.add(torch.zeros((), device="cuda"))
    found = meter.close(meter.state(), 16)
    assert 0.8 < found[FORWARD] <= 1
    assert found[DATA] < 0.1


def test_loaded_models_are_the_saved_weights(tmp_path):
    run = RunFolder.open(train(tiny(tmp_path)))
    for which, name in (("ema", "ema-0.9"), ("raw", "model")):
        model, step = run.load_model(weights=which)
        assert step == 8
        assert not model.training
        saved = weights(run.path, 8, name)
        assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    with pytest.raises(ConfigError, match=r"not a run folder: it has no config\.yaml"):
        RunFolder.open(tmp_path)


def test_seeds_decide(tmp_path):
    runs = [train(tiny(tmp_path, f"name=r{i}", f"seed={seed}")) for i, seed in enumerate((0, 0, 1))]
    first, same, other = (weights(run, 8)["final.weight"] for run in runs)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("setting", ["train.compile=true", "train.precision=bf16"])
def test_faster_ways_train_nearly_the_same(tmp_path, setting):
    config = tiny(tmp_path, "train.steps=4")
    plain = train(again(config, "name=plain"))
    other = train(again(config, "name=other", setting))
    losses = [RunFolder.open(run).metrics()[1]["loss"] for run in (plain, other)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert weights(other, 4).keys() == weights(plain, 4).keys()
    assert all(value.dtype == torch.float32 for value in weights(other, 4).values())


@pytest.mark.parametrize(("precision", "inside"), [("bf16", "tf32"), ("no", None)])
def test_mixed_precision_allows_tf32_within_the_optimizers_step_alone(
    tmp_path, monkeypatch, precision, inside
):
    matmul, seen = torch.backends.cuda.matmul, []
    before, step = matmul.fp32_precision, torch.optim.AdamW.step

    def noted(*args, **kwargs):
        seen.append(matmul.fp32_precision)
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    train(
        tiny(tmp_path, "train.steps=2", "optimizer.name=dopr-adamw", f"train.precision={precision}")
    )
    assert seen == [inside or before] * 2
    assert matmul.fp32_precision == before


def test_unconditional_training(tmp_path):
    run = RunFolder.open(train(tiny(tmp_path, "model.class_conditional=false")))
    assert run.load_model()[0].num_classes == 0


def test_broken_weights_are_not_saved(tmp_path):
    settings = ["optimizer.name=sgd", "optimizer.lr=1e30", "train.max_grad_norm=null"]
    settings += ["train.log_every=100", "train.steps=20", "train.checkpoint_every=5"]
    with pytest.raises(TrainingFailed, match=r"weights are not finite by step 5"):
        train(tiny(tmp_path, *settings))
    assert RunFolder.open(tmp_path / "runs" / "tiny").steps() == []


def test_learning_rate_over_a_run():
    def factors(decay):
        return [lr_factor(s, steps=10, warmup_steps=4, decay=decay) for s in range(10)]

    assert factors("constant") == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]
    assert factors("linear")[4:] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert factors("cosine")[7] == pytest.approx(0.5)
    assert lr_factor(0, steps=1, warmup_steps=0, decay="cosine") == 1


def test_a_cooldown_is_constant_and_then_linear():
    def factors(steps):
        settings = {"warmup_steps": 2, "decay": "cooldown", "cooldown_steps": 4}
        return [lr_factor(s, steps=steps, **settings) for s in range(steps)]

    assert factors(9) == [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert factors(7)[:4] == factors(9)[:4]


def test_the_command_line_says_one_line(tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    tiny(tmp_path)
    assert run_command(["train", str(config), f"output={tmp_path}/runs", "train.steps=1"]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/runs/tiny"
    assert run_command(["train", str(config), f"output={tmp_path}/runs"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "go on with it by --resume" in error
    assert run_command(["train", str(config), "--print-config"]) == 0
    assert capsys.readouterr().out == to_yaml(again(tiny(tmp_path), "output=runs"))
    assert run_command(["nonsense"]) == 2
    assert run_command([]) == 0
    capsys.readouterr()
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out == f"flowdopr {flowdopr.__version__}\n"


def test_the_terminal_gets_counts_and_the_log_every_parameter(tmp_path, capfd):
    path = train(tiny(tmp_path, "optimizer.name=dopr-sgd", "train.steps=2"))
    shown, kept = capfd.readouterr().err, (path / "log.txt").read_text()
    data, summary, step, held_out = shown.strip().split("\n")
    shown_classes = "10 classes (0, 1, 2, 3, 4, ..., 9)"
    assert (
        data == f"data: digits, 1,618 images to train on, 179 held out, 1 x 8 x 8, {shown_classes}"
    )
    found = re.findall(r"(\d+) (?:matrix|bias|embedding)", summary)
    assert sum(map(int, found)) == kept.count(".weight ") + kept.count(".bias ")
    assert summary.startswith("tiny: ")
    assert "1 embedding (AP: 1 none)" in summary
    assert summary.endswith(f"; each is listed in {path / 'log.txt'}")
    assert step.startswith("step 2/2 images 32 loss ")
    assert held_out.startswith("step 2/2 held_out_loss ")
    assert all(line in kept for line in (data, summary, step, held_out))


def test_log_lines_read_as_numbers(tmp_path):
    run = RunFolder.open(train(tiny(tmp_path, "train.max_grad_norm=null")))
    assert all(math.isfinite(line["loss"]) for line in run.metrics() if "loss" in line)
    assert all("grad_norm" not in line for line in run.metrics())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.patch_size=3"], "model.patch_size 3 does not divide"),
        (["sample.guidance.scale=2", "model.class_conditional=false"], "needs a class-conditional"),
        (
            ["sample.guidance.scale=2", "flow.class_dropout_prob=0"],
            "class_dropout_prob=0 leaves untrained",
        ),
        (["optimizer.dopr={rules: [{pattern: gone}]}"], "gone"),
        (["data.name=folder", "data.root=nowhere"], "nowhere"),
        (["train.ema_decays=[0.9, 0.9]"], "ema-0.9 is given twice"),
    ],
)
def test_settings_that_do_not_fit_leave_nothing_behind(tmp_path, settings, words):
    with pytest.raises(ValueError, match=r".") as error:
        train(tiny(tmp_path, *settings))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_every_form_of_dopr_is_reached_from_the_config(tmp_path):
    settings = [
        "optimizer.name=dopr-muon",
        "optimizer.dopr.form=sandwich",
        "optimizer.ns_dtype=bfloat16",
        "optimizer.ns_steps=4",
        "optimizer.dopr.damping=[1.0, 0.1, 100]",
        "optimizer.dopr.rules=[{pattern: mlp, mode: blocks, max_side: 8}, "
        "{pattern: l$, mode: none}]",
    ]
    log = (train(tiny(tmp_path, *settings)) / "log.txt").read_text()
    modes = {line.split()[0]: line for line in log.splitlines() if ".weight" in line}
    assert "blocks" in modes["blocks.0.mlp.up.weight"]
    assert "none" in modes["final.weight"]
    assert "muon in 3 blocks" in modes["blocks.0.attention.qkv.weight"]  # q, k, v
