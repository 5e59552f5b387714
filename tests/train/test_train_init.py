"""Training from the weights of another run, with a schedule of its own."""

import json
import shutil

import pytest
import torch
from tiny import again, tiny, weights

from flowdopr.disk import file_sha256
from flowdopr.train import train

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
        ("model.depth=2", "", r"blocks\.1\..* is missing, .* and \d+ more"),
        ("model.hidden_size=32", "", r" is \[.*\] torch.float32, not \[.*\] torch.float32"),
        ("model.class_conditional=false", "", "is not in the model"),
        ("seed=1", "/nowhere", "nowhere: is missing; let train.init_from name"),
        ("seed=1", "/config.yaml", "is damaged: .*; let train.init_from name"),
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
