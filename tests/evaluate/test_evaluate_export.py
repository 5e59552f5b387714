"""A model as one file for others: it draws what its run draws, and a card has what was measured."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from untrained import save_random_checkpoint

import flowdopr
from flowdopr.cli import run_command
from flowdopr.config import apply_overrides
from flowdopr.evaluate import evaluate
from flowdopr.export import export
from flowdopr.models import build_model
from flowdopr.runs import begin_run, load_initial, open_run


@pytest.mark.parametrize(
    ("weights", "step", "change"), [("ema", None, []), ("raw", 1, []), ("ema", 2, ["model.pc={}"])]
)
def test_an_exported_file_draws_the_images_of_the_run(make_run, tmp_path, weights, step, change):
    run = make_run()
    if change:
        config = apply_overrides(run.config, ["name=changed", *change])
        run = begin_run(config, run.dataset, {}, resume=False)
        save_random_checkpoint(run, step)
    options = ["--weights", weights, *(["--step", str(step)] if step else [])]
    command = ["export", str(run.path), f"--out={tmp_path / 'out'}", *options]
    assert run_command(command) == 0
    file = tmp_path / "out" / "model.safetensors"
    run.path.rename(tmp_path / "moved")  # the file stands alone
    own, other = flowdopr.load(tmp_path / "moved", weights, step), flowdopr.load(file)
    assert (own.step, own.config) == (other.step, other.config)
    images = [model.sample(5, labels="3-7", seed=2) for model in (own, other)]
    assert torch.equal(*images)


def test_the_commands_take_an_exported_file(make_run, tmp_path):
    run = make_run()
    file = export(run.path, tmp_path / "out") / "model.safetensors"
    for place in (run.path, file):
        out = f"--out={tmp_path / place.stem}-images"
        assert run_command(["sample", str(place), "--num=4", out]) == 0
    grids = [
        (tmp_path / f"{place.stem}-images" / "grid.png").read_bytes() for place in (run.path, file)
    ]
    assert grids[0] == grids[1]
    model = build_model(run.config, run.dataset.image_shape, run.dataset.num_classes)
    load_initial(model, str(file))
    expected = run.load_model()[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    with safe_open(file, framework="pt") as opened:
        origin = json.loads(opened.metadata()["origin"])
    assert (origin["run"], origin["step"], origin["weights"]) == ("tiny", 2, "ema-0.9999")


def test_the_model_card_has_the_metrics_of_these_weights_alone(make_run, tmp_path):
    run = make_run()
    (run.path / "samples" / "step-00000002.png").write_bytes(b"a picture")
    cards = [
        json.loads(evaluate(run.path, ["evaluate.gallery=0", *more], step=step).read_text())
        for step, more in ((2, []), (1, []), (2, ["evaluate.weights=raw"]))
    ]
    out = export(run.path, tmp_path / "out", license="apache-2.0")
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "flowdopr")
    assert "flow-matching" in card.data.tags
    distances = [f"| fd | {made['metrics']['fd']:.6g} |" for made in cards]
    assert [line in card.text for line in distances] == [True, False, False]
    assert "40 images by euler with 2 model calls each, without guidance" in card.text
    assert "samples.png" in card.text
    assert (out / "samples.png").read_bytes() == b"a picture"
    config = yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])
    assert config["model"]["hidden_size"] == 16
    names: dict = {}
    code = card.text.partition("```python\n")[2].partition("```")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        exec(code, names)
    assert names["images"].shape == (16, 1, 8, 8)
    raw = ModelCard.load(export(run.path, tmp_path / "raw", step=1, weights="raw") / "README.md")
    assert "were not evaluated" in raw.text
    assert "samples.png" not in raw.text


def changed_header(file: Path, **changes: str) -> None:
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata() | changes
    save_file(load_file(file), file, {key: value for key, value in header.items() if value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": ""}, "its header has no config, data set and origin; give a run folder"),
        ({"config": "base: /etc/passwd"}, "is damaged: .*this file must stand alone"),
        ({"config": "a: &b"}, "is damaged"),
        ({"dataset": "{}"}, "is damaged: name: Field required"),
        ({"origin": "[]"}, "is damaged"),
    ],
)
def test_files_of_others_are_refused(make_run, tmp_path, change, words):
    file = export(make_run().path, tmp_path / "out") / "model.safetensors"
    changed_header(file, **change)
    with pytest.raises(ValueError, match=words) as error:
        open_run(file)
    assert "\n" not in str(error.value)


def test_what_an_exported_file_has_not_is_refused(make_run, tmp_path):
    run = make_run()
    file = export(run.path, tmp_path / "out") / "model.safetensors"
    for wanted in ({"weights": "raw"}, {"step": 1}):
        with pytest.raises(ValueError, match=r"weights ema-0.9999 of step 2 alone"):
            flowdopr.load(file, **wanted)
    with pytest.raises(ValueError, match="out: is there already; choose another --out"):
        export(run.path, tmp_path / "out")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: is damaged"):
        flowdopr.load(file)
