"""Autoguidance by a second run: equation (7) with its model, named in the card, or refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from untrained import make_config, save_random_checkpoint

from flowdopr.cli import run_command
from flowdopr.config import ConfigError, apply_overrides
from flowdopr.data import to_uint8
from flowdopr.evaluate import evaluate, sample
from flowdopr.evaluate.generate import balanced_labels
from flowdopr.flow import build_sampling, generate
from flowdopr.runs import begin_run, load_guide
from flowdopr.runs.checkpoint import write_manifest
from flowdopr.train import train

QUICK = ["evaluate.metrics=[]", "evaluate.fid_num_images=12"]


def guided_by(run, more="", scale=2.0):
    return [f"sample.guidance={{scale: {scale}, guide: {{run: {run.path}, {more}}}}}"]


@pytest.fixture
def other_run(tmp_path, digits):
    """`other_run("a.b=value", ..., info=...)` -> a second run with checkpoints at steps 3 and 4."""

    def make(*overrides, info=digits.info):
        config = apply_overrides(make_config(tmp_path), ["name=guide", *overrides])
        run = begin_run(config, info, {}, resume=False)
        for step in (3, 4):
            save_random_checkpoint(run, step)
        return run

    return make


def test_the_guide_takes_the_place_of_the_unconditional_branch(make_run, other_run, tmp_path):
    run, guide = make_run(), other_run("model.hidden_size=8")
    settings = guided_by(guide, "weights: raw, step: 3")
    out = sample(run.path, settings, num=4, out=tmp_path / "out", npz=True)
    model, guide_model = run.load_model()[0], guide.load_model(3, "raw")[0]
    sampling = build_sampling(apply_overrides(run.config, ["sample.guidance.scale=2.0"]))
    expected = generate(
        model, balanced_labels(4, 10), seed=0, sampling=sampling, guide_model=guide_model
    )
    found = torch.from_numpy(np.load(out / "samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    assert (found.int() - to_uint8(expected.images).int()).abs().max() <= 1
    card = json.loads((out / "sampling.json").read_text())["sampling"]
    assert card["nfe"] == expected.nfe == 4
    assert card["guide"].items() >= {"run": "guide", "step": 3, "weights": "raw"}.items()
    assert len(card["guide"]["sha256"]) == 64


def test_the_card_names_the_guide_and_follows_its_weights(make_run, other_run):
    run, guide = make_run(), other_run()
    wanted = [*QUICK, "sample.guidance.scale=1.5"]
    guided = [*wanted, f"sample.guidance.guide.run={guide.path}"]
    paths = [evaluate(run.path, wanted), evaluate(run.path, guided)]
    paths.append(evaluate(run.path, [*guided, "sample.guidance.guide.step=3"]))
    average = next(guide.checkpoint_path(4).glob("ema*"))
    average.write_bytes((guide.checkpoint_path(3) / average.name).read_bytes())
    write_manifest(average.parent, {"step": 4})
    paths.append(evaluate(run.path, guided))
    assert len(set(paths)) == 4
    cards = [json.loads(path.read_text())["sampling"] for path in paths]
    assert "guide" not in cards[0]
    assert cards[0]["guidance"]["guide"] is None
    assert [card["guide"]["step"] for card in cards[1:]] == [4, 3, 4]
    assert cards[1]["guide"]["sha256"] != cards[2]["guide"]["sha256"] == cards[3]["guide"]["sha256"]
    assert cards[1]["guidance"]["guide"]["run"] == str(guide.path)


def test_an_unconditional_guide_serves_a_conditional_model_and_not_the_reverse(
    make_run, other_run, tmp_path
):
    plain = other_run("model.class_conditional=false")
    run = make_run()
    sample(run.path, guided_by(plain), num=1, out=tmp_path / "out")
    conditional = apply_overrides(plain.config, guided_by(run))
    with pytest.raises(ValueError, match="its number of classes is 10, this run's is 0"):
        load_guide(conditional, plain.dataset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["flow.path=cosine"], "its flow.path is .*cosine.*, this run's is .*linear"),
        (["flow.prediction=data"], "its flow.prediction is data, this run's is velocity"),
    ],
)
def test_a_guide_of_another_flow_is_refused(make_run, other_run, tmp_path, change, message):
    run, guide = make_run(), other_run(*change)
    with pytest.raises(ValueError, match=message) as caught:
        sample(run.path, guided_by(guide), num=1, out=tmp_path / "o")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_shape": (1, 16, 16)}, "its image shape is 1 x 16 x 16, this run's is 1 x 8 x 8"),
        ({"num_classes": 7}, "its number of classes is 7, this run's is 10"),
        ({"autoencoder": {"weights_sha256": "abc"}}, "its autoencoder is abc, this run's is None"),
    ],
)
def test_a_guide_of_other_images_is_refused(make_run, other_run, digits, change, message):
    info = replace(digits.info, **change)
    run, guide = make_run(), other_run(info=info)
    with pytest.raises(ValueError, match=message):
        evaluate(run.path, guided_by(guide))
    assert not list((run.path / "evaluation").iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["sample.guidance={scale: 2, guide: {run: nowhere}}"], "nowhere: not a run folder"),
        (["sample.guidance={scale: 1, guide: {run: nowhere}}"], "set sample.guidance=null, or ano"),
        (["sample.guidance.guide.run=nowhere"], "sample.guidance.scale: missing"),
        (["sample.guidance={scale: 2, guide: {step: 1}}"], "sample.guidance.guide.run: missing"),
        (["sample.guidance={scale: 2, interval: [0.8, 0.2]}"], r"is \[0.8, 0.2\]: need 0 <="),
    ],
)
def test_settings_of_a_guide_that_cannot_work_are_refused(make_run, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(make_run().path, settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("flow.class_dropout_prob=0", "flow.class_dropout_prob=0 leaves untrained: train with 0.1"),
        (
            "model.class_conditional=false",
            "needs a class-conditional model: set sample.guidance=",
        ),
    ],
)
def test_guidance_by_an_untrained_branch_is_refused_by_all(other_run, tmp_path, change, message):
    run, guide, out = other_run(change), other_run("name=second"), tmp_path / "out"
    for scale in (0.0, 3.0):
        with pytest.raises(ConfigError, match=message):
            sample(run.path, [f"sample.guidance.scale={scale}"], num=1, out=out)
        with pytest.raises(ConfigError, match=message):
            evaluate(run.path, [*QUICK, f"sample.guidance.scale={scale}"])
        with pytest.raises(ConfigError, match=message):
            train(apply_overrides(run.config, ["name=new", f"sample.guidance.scale={scale}"]))
    assert not out.exists()
    assert not list((run.path / "evaluation").iterdir())
    sample(run.path, num=1, out=out)
    if "dropout" in change:
        sample(run.path, guided_by(guide), num=1, out=tmp_path / "guided")


def test_training_draws_its_grids_with_the_guide(other_run, tmp_path):
    guide = other_run()
    # Without class dropout there is no unconditional branch, and with a guide none is needed.
    config = apply_overrides(
        make_config(tmp_path), [*guided_by(guide), "flow.class_dropout_prob=0"]
    )
    assert (train(config) / "samples" / "step-00000002.png").is_file()
    absent = apply_overrides(config, ["name=absent", "sample.guidance.guide.run=nowhere"])
    with pytest.raises(ValueError, match="nowhere: not a run folder"):
        train(absent)
    assert not (tmp_path / "absent").exists()


def test_the_command(make_run, other_run, tmp_path):
    run, guide = make_run(), other_run()
    command = ["sample", str(run.path), "--num", "1", "--out", str(tmp_path / "out")]
    options = ["--guide-run", str(guide.path), "--guide-weights", "raw", "--guide-step", "3"]
    assert run_command([*command, *options]) == 2
    assert run_command([*command, *options, "--guidance-scale", "2"]) == 0
    card = json.loads((tmp_path / "out" / "sampling.json").read_text())["sampling"]["guide"]
    assert (card["step"], card["weights"]) == (3, "raw")


def test_guide_and_run_need_not_be_of_one_size(make_run, other_run, tmp_path):
    guide = other_run("model.depth=2", "model.hidden_size=8")
    config = apply_overrides(make_run().config, guided_by(guide, scale=3))
    model, origin = load_guide(config, guide.dataset)
    assert not model.training
    assert origin == {"run": "guide", "step": 4, "weights": "ema"}
