"""Weights that do not fit: what they show of the settings that they need."""

import pytest
import torch

from flowdopr.disk import write_tensors
from flowdopr.models import DiT, UNet, add_pc_layers
from flowdopr.runs import load_initial

DIT = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 2}
UNET = {
    "channels": 8,
    "channel_multipliers": (1,),
    "num_res_blocks": 1,
    "attention_resolutions": (),
}


def dit(classes=0, **changes):
    return DiT((1, 8, 8), classes, **DIT | changes)


def unet(**changes):
    return UNet((1, 8, 8), **UNET | changes)


@pytest.mark.parametrize(
    ("stored", "model", "remedy"),
    [
        (unet(channels=16), unet(), "set model.channels=16"),
        (unet(num_res_blocks=2), unet(), "set model.channel_multipliers, model.num_res_blocks, .*"),
        (unet(), dit(), "set model.name=unet .*"),
        (DiT((1, 8, 8), size="XS"), dit(), "set model.size=XS"),
        (dit(hidden_size=32, depth=2), dit(), "set model.depth=2 model.hidden_size=32"),
        (dit(), add_pc_layers(dit()), "set model.pc=null"),
        (add_pc_layers(dit()), dit(), "set model.pc to that of its run"),
        (
            dit(classes=3),
            dit(classes=2),
            "its model has 3 classes: train on data that have as many",
        ),
        (torch.nn.Linear(2, 2), dit(), "let train.init_from name a run folder, or a file of .*"),
    ],
)
def test_the_setting_that_weights_need_is_named(tmp_path, stored, model, remedy):
    write_tensors(tmp_path / "a.safetensors", stored.state_dict())
    with pytest.raises(ValueError, match=rf"a.safetensors: does not fit the model: .*; {remedy}$"):
        load_initial(model, str(tmp_path / "a.safetensors"))


def test_weights_of_another_precision_are_converted(tmp_path):
    stored, model = dit(), dit()
    torch.save(stored.bfloat16().state_dict(), tmp_path / "a.pt")
    load_initial(model, str(tmp_path / "a.pt"))
    torch.testing.assert_close(model.state_dict(), stored.float().state_dict(), rtol=0, atol=0)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    stored = dit().state_dict()
    stored["final.bias"][0] = torch.nan
    torch.save(stored, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt: final.bias has numbers that are not finite; let"):
        load_initial(dit(), str(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"x_embedder.proj.weight": torch.ones(2), "pos_embed": torch.ones(())}, "is damaged: "),
        ({"x_embedder.proj.weight": torch.ones(2)}, "does not fit the model"),
        ([torch.ones(2)], "is damaged: it holds a list in place of named weights; let"),
        ({"ema": {"a": 1}}, "does not fit the model: .* is missing"),
        (None, "is damaged: it is not a file of tensors alone, and no other is opened; let"),
    ],
)
def test_files_of_other_things_are_refused_in_one_line(tmp_path, content, words):
    path = tmp_path / "a.pt"
    path.write_bytes(b"no weights") if content is None else torch.save(content, path)
    with pytest.raises(ValueError, match=rf"a.pt: {words}") as error:
        load_initial(dit(), str(path))
    assert "\n" not in str(error.value)
