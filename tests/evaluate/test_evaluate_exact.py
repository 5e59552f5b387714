"""Bits per dimension and the excess error in the card, with how they were measured."""

import json
import math
from dataclasses import replace

import pytest
import torch

from flowdopr.config import ConfigError, apply_overrides
from flowdopr.data import Datasets, ImageTensor, from_uint8
from flowdopr.evaluate import evaluate, exact
from flowdopr.evaluate.exact import check_exact, excess, likelihood
from flowdopr.flow import EmpiricalVelocity, Sampling, bits_per_dim
from flowdopr.runs import RunFolder

SMALL = ["evaluate.fid_num_images=4"]
LOOSE = ["evaluate.bpd.atol=1e-2", "evaluate.bpd.rtol=1e-2"]


def configured(run: RunFolder, *overrides: str):
    return apply_overrides(run.config, [*SMALL, *LOOSE, "evaluate.excess={}", *overrides])


def test_both_are_in_the_card_with_their_settings(make_run, digits):
    run = make_run()
    wanted = ["evaluate.metrics=[]", "evaluate.bpd.num_images=3"]
    wanted += ["evaluate.excess.num_images=20", "evaluate.seed=4", "sample.guidance.scale=2.0"]
    card = json.loads(evaluate(run.path, [*SMALL, *LOOSE, *wanted]).read_text())
    assert "fd" not in card["metrics"]
    assert card["metrics"]["bpd"] > 0
    assert card["metrics"]["bpd_se"] > 0
    told = card["likelihood"]
    assert told.pop("nfe") > 6
    assert told == {
        "num_images": 3,
        "trace": "hutchinson",
        "times": {"start": 0.0, "end": 1.0},
        "solver": "dopri5",
        "atol": 0.01,
        "rtol": 0.01,
        "dequantisation": "uniform",
        "seed": 4,
    }
    parts = [card["metrics"][name] for name in ("excess", "irreducible", "train_one_step_loss")]
    assert all(part > 0 for part in parts)
    assert len(card["metrics"]["excess_by_time"]) == 10
    assert card["oracle"] == {
        "num_images": 20,
        "training_images": digits.info.num_train,
        "mirrored_copies": False,
        "rollout_space": "velocity",
        "guidance_scale": 1.0,
        "seed": 4,
    }


def test_the_feedback_gap_is_the_ratio_of_both_errors_where_they_are_in_one_space(make_run):
    run = make_run()
    wanted = [*SMALL, "evaluate.metrics=[]", "evaluate.excess.num_images=20"]
    found = json.loads(evaluate(run.path, wanted).read_text())["metrics"]
    ratios = [
        None if rollout is None else rollout / path
        for rollout, path in zip(
            found["rollout_excess_by_time"], found["excess_by_time"], strict=True
        )
    ]
    assert found["feedback_gap_by_time"] == pytest.approx(ratios)
    other = json.loads(evaluate(run.path, [*wanted, "evaluate.excess.space=data"]).read_text())
    assert "feedback_gap_by_time" not in other["metrics"]


def test_drift_grows_along_the_rollouts_of_an_untrained_model(make_run):
    run = make_run()
    wanted = [*SMALL, "evaluate.metrics=[]", "evaluate.drift.num_images=100"]
    card = json.loads(evaluate(run.path, [*wanted, "sample.solver.steps=10"]).read_text())
    by_time = card["metrics"]["drift_by_time"]
    assert abs(by_time[0]) < 0.01 < 0.1 < by_time[-1] < 1
    assert card["drift"] == {"num_images": 100, "guidance_scale": 1.0, "seed": 0}


def test_bits_per_dim_are_those_of_the_flow_room(make_run, digits):
    run = make_run()
    model, _ = run.load_model()
    config = configured(run, "evaluate.bpd.num_images=1000", "evaluate.bpd.trace=exact")
    held_out = ImageTensor(digits.held_out.images[:2], digits.held_out.labels[:2])
    metrics, settings = likelihood(
        config, model, Datasets(digits.train, held_out, digits.info), "cpu"
    )
    sampling = Sampling(solver="dopri5", atol=1e-2, rtol=1e-2)
    # All of a small held-out set is taken, in a shuffled order that the noise follows.
    bits = {
        bits_per_dim(
            model,
            held_out.images[order],
            held_out.labels[order],
            seed=0,
            trace="exact",
            sampling=sampling,
        )
        .bits.double()
        .mean()
        .item()
        for order in (torch.tensor([0, 1]), torch.tensor([1, 0]))
    }
    assert metrics["bpd"] in bits
    assert settings["num_images"] == 2


def test_an_unlearnt_prior_costs_what_a_gaussian_does(make_run, digits):
    """A velocity of 0 leaves the standard normal: its code length is known."""
    run = make_run(class_conditional=False)
    model, _ = run.load_model()
    for weight in model.parameters():
        weight.data.zero_()
    metrics, _ = likelihood(configured(run, "evaluate.bpd.num_images=30"), model, digits, "cpu")
    square = from_uint8(digits.held_out.images).square().mean().item() + 1 / (12 * 127.5**2)
    expected = (math.log(2 * math.pi) + square) / (2 * math.log(2)) + math.log2(127.5)
    assert abs(metrics["bpd"] - expected) < 4 * metrics["bpd_se"] + 0.05


@pytest.mark.parametrize("flip", [False, True])
def test_the_exact_velocity_has_no_excess(make_run, digits, flip):
    run = make_run()
    config = configured(
        run, "evaluate.excess.num_images=40", f"data.horizontal_flip={str(flip).lower()}"
    )
    images, labels = from_uint8(digits.train.images), digits.train.labels
    if flip:
        images, labels = torch.cat([images, images.flip(-1)]), torch.cat([labels, labels])
    metrics, settings = excess(config, EmpiricalVelocity(images, labels), digits, "cpu")
    assert metrics["excess"] == 0
    assert metrics["rollout_excess"] == 0
    assert metrics["irreducible"] == metrics["train_one_step_loss"] > 0
    assert settings["training_images"] == len(images)
    half = EmpiricalVelocity(images[::2], labels[::2])
    assert excess(config, half, digits, "cpu")[0]["excess"] > 0.01


def test_an_unconditional_model_is_held_against_all_images(make_run, digits):
    run = make_run(class_conditional=False)
    oracle = EmpiricalVelocity(from_uint8(digits.train.images))
    config = configured(run, "evaluate.excess.num_images=30")
    assert excess(config, oracle, digits, "cpu")[0]["excess"] == 0
    model, _ = run.load_model()
    assert excess(config, model, digits, "cpu")[0]["excess"] > 0.01


def test_cards_of_other_settings_are_others(make_run):
    run = make_run()
    wanted = [*SMALL, *LOOSE, "evaluate.metrics=[]", "evaluate.bpd.num_images=1"]
    paths = {
        evaluate(run.path, wanted),
        evaluate(run.path, [*wanted, "evaluate.bpd.num_images=2"]),
        evaluate(run.path, [*wanted, "evaluate.bpd.rtol=1e-1"]),
    }
    assert len(paths) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["flow.coupling=exact"], "closed form for flow.coupling=independent, not ex"),
        ([], r"excess compares each call with all 1618 training images, more than 99;"),
    ],
)
def test_what_cannot_be_measured_is_refused(make_run, digits, monkeypatch, overrides, message):
    monkeypatch.setattr(exact, "LARGEST_TRAINING_SET", 99)
    config = apply_overrides(make_run().config, ["evaluate.excess={}", *overrides])
    with pytest.raises(ValueError, match=message) as caught:
        check_exact(config, digits)
    assert "\n" not in str(caught.value)


def test_drift_needs_two_held_out_images(make_run, digits):
    one = ImageTensor(digits.held_out.images[:1], digits.held_out.labels[:1])
    config = apply_overrides(make_run().config, ["evaluate.drift={}"])
    with pytest.raises(ConfigError, match=r"evaluate\.drift needs two held-out images"):
        check_exact(config, replace(digits, held_out=one))


def test_latents_have_no_bits_and_no_finite_training_set(make_run, digits):
    info = replace(digits.info, autoencoder={"name": "x"})
    train = ImageTensor(digits.train.images, digits.train.labels)
    train.random = True
    latents = Datasets(train, digits.held_out, info)
    run = make_run()
    for metric, message in (("bpd", "a model of latents has none"), ("excess", "drawn anew")):
        with pytest.raises(ValueError, match=message):
            check_exact(apply_overrides(run.config, [f"evaluate.{metric}={{}}"]), latents)
