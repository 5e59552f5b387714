"""Training with PC layers: their state in checkpoints and on several processes, and what is merged
when a run is read."""

import re

import pytest
import torch
from test_train_processes import assert_close_weights, train_on_two
from tiny import again, assert_same_checkpoint, tiny, weights

from flowdopr.models import build_model, pc_layers
from flowdopr.models.pc import LEVELS, polynomial
from flowdopr.runs import RunFolder
from flowdopr.train import train

PC = ["model.pc={}", "optimizer.eps=1e-4"]
FEW = '{"level": 2, "layers": ["mlp.up"]}'
EFFECTIVE = [
    "optimizer.name=muon",
    "optimizer.dopr={pc_gradient: effective, damping: 0.1}",
]
UNET = [
    "model={name: unet, channels: 8, channel_multipliers: [1, 2], attention_resolutions: [4], "
    "num_res_blocks: 1, num_heads: 2, pc: {layers: ['conv_[12]$', attention]}}"
]


@pytest.mark.parametrize("settings", [[*PC, *EFFECTIVE], UNET], ids=["dit", "unet"])
def test_a_resumed_run_equals_the_straight_one(tmp_path, settings):
    config = tiny(tmp_path, *settings, "train.steps=12")
    straight = train(again(config, "name=straight"))
    train(again(config, "name=cut", "train.steps=5"))
    assert_same_checkpoint(straight, train(again(config, "name=cut"), resume=True), 12)


@pytest.mark.parametrize(
    "parts",
    [
        "micro-batches",
        pytest.param("processes", marks=pytest.mark.slow),
        pytest.param("shards", marks=pytest.mark.slow),
    ],
)
def test_a_batch_in_parts_equals_the_whole_one(tmp_path, parts):
    settings = [*PC, *EFFECTIVE]
    whole = train(tiny(tmp_path, *settings, "name=whole"))
    if parts == "micro-batches":
        config = tiny(tmp_path, *settings, "name=parts", "train.accumulation_steps=4")
        other = train(config)
    else:
        other = train_on_two(tmp_path, *settings, "name=parts", sharded=parts == "shards")
    assert_close_weights(whole, other, 8, ("condition.",))


def test_a_run_is_read_with_f_of_its_averages_as_plain_weights(tmp_path):
    run = RunFolder.open(train(tiny(tmp_path, *PC, "train.steps=30", "train.validate_every=30")))
    for name in ("ema", "raw"):
        merged, stored = run.load_model(weights=name)[0], run.load_weights(30, name)
        layers = pc_layers(build_model(run.config, run.dataset.image_shape, 10))
        assert not pc_layers(merged)
        assert len(layers) == 3
        for layer in layers:
            w, gain = stored[f"{layer}.weight"], stored[f"{layer}.weight_map.gain"]
            norm = torch.linalg.matrix_norm(w, 2)
            expected = gain * norm * polynomial((w / norm)[None], LEVELS[4])[0]
            found = merged.get_submodule(layer).weight
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("source", "model", "place", "refusal"),
    [
        (PC, PC, "run", ""),
        (PC, [], "run", ""),
        (PC, ["model.pc={power_iterations: 2}"], "run", ""),
        (PC, [], "file", "set model.pc='{}'"),
        ([f"model.pc={FEW}"], PC, "run", f"set model.pc='{FEW}'"),
        ([f"model.pc={FEW}"], [f"model.pc={FEW}", "model.pc.level=3"], "file", f"pc='{FEW}'"),
        ([], PC, "run", "; set model.pc=null"),
    ],
)
def test_training_starts_from_another_kind_of_run(tmp_path, source, model, place, refusal):
    run = train(tiny(tmp_path, *source, "name=source"))
    file = run / "checkpoints" / "step-00000008" / "ema-0.9.safetensors"
    where = file if place == "file" else run
    config = tiny(tmp_path, *model, "name=new", f"train.init_from={where}", "train.steps=1")
    config = again(config, "optimizer.lr=1e-30")
    if refusal:
        with pytest.raises(ValueError, match=f"{re.escape(refusal)}$"):
            train(config)
        return
    new = RunFolder.open(train(config))
    expected, found = (RunFolder.open(r).load_model()[0].state_dict() for r in (run, new.path))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3)
    assert any("weight_map" in name for name in weights(new.path, 1)) == bool(model)
