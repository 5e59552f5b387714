"""Training from the weights of another run or project, with a schedule of its own."""

import argparse
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import again, tiny, weights

from flowdopr.disk import file_sha256
from flowdopr.runs import RunFolder
from flowdopr.train import train

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from peers import SiT

NO_CHANGE = ("optimizer.lr=1e-30", "train.steps=1")  # too small to change a float32


@pytest.mark.parametrize("source", ["run", "file"])
def test_training_starts_from_the_weights_of_a_run_or_a_file(tmp_path, source):
    config = tiny(tmp_path, "train.lr_decay=cosine")
    run = train(config)
    name = "ema-0.9" if source == "run" else "model"
    file = run / "checkpoints" / "step-00000008" / f"{name}.safetensors"
    place = run if source == "run" else file
    new = train(again(config, "name=new", f"train.init_from={place}", *NO_CHANGE))
    expected = weights(run, 8, name)
    for which in ("model", "ema-0.9"):
        found = weights(new, 1, which)
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
    origin = json.loads((new / "versions.json").read_text())["init_from"]
    assert origin == {"file": str(file), "sha256": file_sha256(file)}


def test_resuming_does_not_read_the_first_weights_again(tmp_path):
    source = train(tiny(tmp_path, "name=source"))
    config = tiny(tmp_path, f"train.init_from={source}", "train.steps=3")
    straight = train(again(config, "name=straight", "train.steps=8"))
    train(config)
    shutil.rmtree(source)
    resumed = train(again(config, "train.steps=8"), resume=True)
    assert torch.equal(*(weights(run, 8)["final.weight"] for run in (straight, resumed)))
    made_by = json.loads((resumed / "versions.json").read_text())
    assert "init_from" in made_by["earlier"][0]


@pytest.mark.parametrize(
    ("change", "place", "words"),
    [
        ("model.depth=2", "", r"blocks\.1\..* is missing, .* and \d+ more; set model\.depth=1$"),
        (
            "model.hidden_size=32",
            "",
            r" is \[.*\] torch.float32, not .*; set model.hidden_size=16$",
        ),
        ("model.patch_size=2", "", r" is \[.*\] torch.float32, not .*; set model.patch_size=4$"),
        ("model.mlp=swiglu", "", r"set model.mlp_ratio, model.mlp and model.qk_norm to those of"),
        ("model.class_conditional=false", "", "is not in .*; set model.class_conditional=true"),
        ("model={name: unet, channels: 8, attention_resolutions: []}", "", "set model.name=dit"),
        ("seed=1", "/nowhere", "nowhere: is missing; let train.init_from name"),
        ("seed=1", "/config.yaml", "is damaged: .* of tensors alone.*; let train.init_from name"),
        ("seed=1", "/samples", "not a run folder"),
    ],
)
def test_weights_that_cannot_be_used_are_refused_before_anything_is_written(
    tmp_path, change, place, words
):
    source = train(tiny(tmp_path, "name=source", "train.steps=1"))
    with pytest.raises(ValueError, match=words) as error:
        train(tiny(tmp_path, "name=new", change, f"train.init_from={source}{place}"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs" / "new").exists()


SIT = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 4}


def test_training_starts_from_a_published_sit(tmp_path):
    """One that its own script saved: weights, average, optimizer and options."""
    average, other = SiT((1, 8, 8), 10, **SIT), SiT((1, 8, 8), 10, **SIT)
    torch.nn.init.normal_(average.final_layer.linear.weight)
    stored = {"model": other.state_dict(), "ema": average.state_dict(), "opt": {}}
    torch.save(stored | {"args": argparse.Namespace(model="SiT-S/2")}, tmp_path / "sit.pt")
    torch.save(average, tmp_path / "whole.pt")
    place = f"train.init_from={tmp_path}/sit.pt"
    run = train(tiny(tmp_path, place, "optimizer=dopr-adamw", *NO_CHANGE))
    x, t, y = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 9, 10])
    model, _ = RunFolder.open(run).load_model()
    torch.testing.assert_close(model(x, t, y), average(x, t, y))
    with pytest.raises(ValueError, match=r"not a file of tensors alone, and no other is opened"):
        train(tiny(tmp_path, "name=whole", f"train.init_from={tmp_path}/whole.pt"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.depth=2", r"blocks\.1\..* is missing.*set model.depth=1$"),
        (
            "data.channels=3",
            r"embed.weight is \[16, 16\] .*, not \[16, 48\].*; its model has 16 channels x",
        ),
        ("seed=1", r"is \[8, 16\] .*, not \[11, 16\] .*; its model has 7 classes: train on data"),
        ("model.class_conditional=false", "condition.label.weight is not in the model"),
        ("model={name: unet, channels: 8, attention_resolutions: []}", "; set model.name=dit$"),
    ],
)
def test_a_published_sit_that_does_not_fit_is_refused(tmp_path, change, words):
    classes = 7 if change == "seed=1" else 10
    torch.save(SiT((1, 8, 8), classes, **SIT).state_dict(), tmp_path / "sit.pt")
    with pytest.raises(ValueError, match=words) as error:
        train(tiny(tmp_path, change, f"train.init_from={tmp_path}/sit.pt"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()
