"""Cards: everything needed to repeat a number, made once, never for other weights or data."""

import pytest
import torch
from untrained import make_config, save_random_checkpoint

from flowdopr.config import apply_overrides
from flowdopr.data import plain_batches
from flowdopr.disk import cache_folder, read_json, sealed, write_json
from flowdopr.evaluate import Evaluator, evaluate, measure
from flowdopr.evaluate.card import answers, card_settings
from flowdopr.evaluate.generate import balanced_labels, labels_like_data, repeated_labels
from flowdopr.flow import ONE_STEP_BATCH, build_objective, one_step_loss
from flowdopr.runs import averages_of, begin_run
from flowdopr.runs.checkpoint import write_manifest
from flowdopr.train import train


def read(path):
    return read_json(path, "")


def test_a_card_says_all_that_is_needed(make_run, digits):
    run = make_run()
    path = evaluate(run.path)
    card = read(path)
    assert path.parent == run.path / "evaluation"
    assert (card["run"], card["step"], card["weights"], card["proxy"]) == ("tiny", 2, "ema", True)
    assert set(card["metrics"]) == {
        *("one_step_loss", "one_step_loss_by_time", "one_step_loss_by_time_se"),
        *("fd", "kid_mean", "kid_std", "precision", "recall", "f_score", "label_accuracy"),
        *("spectrum", "spectrum_error", "spectrum_error_lowest"),
    }
    assert card["floor"]["num_images"] == 40
    for name in ("fd", "kid_mean", "spectrum_error"):
        assert card["floor"][name] < card["metrics"][name]
    assert (
        card["sampling"].items()
        >= {
            "solver": {"name": "euler", "steps": 2, "grid": {"name": "uniform"}},
            "guidance": None,
            "nfe": 2,
            "num_images": 40,
            "labels": "balanced",
            "seed": 0,
        }.items()
    )
    assert "batch_size" not in card["sampling"]
    assert card["extractor"]["name"] == "flowdopr-classifier"
    assert card["extractor"]["held_out_accuracy"] > 0.97
    assert len(card["extractor"]["weights_sha256"]) == 64
    assert card["reference"] == {
        "name": "digits train",
        "fingerprint": digits.info.fingerprint,
        "num_images": digits.info.num_train,
    }
    assert card["uint8"] == "((x + 1) * 127.5).round().clamp(0, 255)"
    assert {"torch", "torch-fidelity"} <= set(card["versions"])
    assert len(card["checkpoint"]["sha256"]) == 64
    assert card["seconds"] > 0


def test_the_one_step_loss_is_the_held_out_velocity_error(make_run, digits):
    run = make_run()
    card = read(evaluate(run.path, ["evaluate.metrics=[]", "evaluate.seed=3"]))
    model, _ = run.load_model()
    batches = plain_batches(digits.held_out, ONE_STEP_BATCH)
    expected = one_step_loss(build_objective(run.config), model, batches, seed=3)
    assert card["metrics"]["one_step_loss"] == expected.mean
    assert card["metrics"]["one_step_loss_by_time"] == expected.by_time
    times = {"distribution": "uniform", "start": 0.0, "end": 1.0}
    assert card["one_step"] == {"times": times, "seed": 3}


def test_the_excess_of_rollouts_is_taken_in_the_space_asked_for(make_run):
    run = make_run()
    wanted = ["evaluate.metrics=[]", "evaluate.excess.num_images=5", "evaluate.seed=3"]
    spaces = ("velocity", "data")
    paths = [evaluate(run.path, [*wanted, f"evaluate.excess.space={name}"]) for name in spaces]
    cards = [read(path) for path in paths]
    assert paths[0] != paths[1]
    assert [card["oracle"]["rollout_space"] for card in cards] == list(spaces)
    assert cards[0]["metrics"]["excess"] == cards[1]["metrics"]["excess"]
    # Euler's first call is at t = 0, where the error of the data is that of the velocity.
    first = [card["metrics"]["rollout_excess_by_time"][0] for card in cards]
    assert first[0] == pytest.approx(first[1], rel=1e-4)
    last = [card["metrics"]["rollout_excess_by_time"][5] for card in cards]
    assert last[1] == pytest.approx(last[0] / 4, rel=1e-4)  # (1 - t)^2 at the second, t = 0.5


def test_the_same_question_is_answered_once_and_alike(make_run):
    run = make_run()
    path = evaluate(run.path)
    first, written = read(path), path.stat().st_mtime_ns
    assert evaluate(run.path) == path
    assert path.stat().st_mtime_ns == written
    assert evaluate(run.path, force=True) == path
    assert path.stat().st_mtime_ns != written
    assert read(path)["metrics"] == first["metrics"]


def test_several_cards_of_a_run_load_everything_once_and_say_the_same(make_run, monkeypatch):
    run, counts = make_run(), {}
    asked = [(1, []), (2, []), (2, ["sample.solver.steps=3"]), (2, ["evaluate.seed=1"])]
    apart = [read(evaluate(run.path, changes, step=step)) for step, changes in asked]
    names = ("build_datasets", "RealImages", "held_out_loss")

    def counting(name, original):
        def counted(*arguments):
            counts[name] = counts.get(name, 0) + 1
            return original(*arguments)

        return counted

    for name in names:
        monkeypatch.setattr(measure, name, counting(name, getattr(measure, name)))
    evaluator = Evaluator(run.path)
    together = [read(evaluator.card(changes, step=step, force=True)) for step, changes in asked]
    assert counts == dict(zip(names, (1, 1, 3), strict=True))
    for card, other in zip(apart, together, strict=True):
        assert card | {"seconds": 0} == other | {"seconds": 0}


def test_a_card_holds_the_settings_that_decided_it(make_run):
    run = make_run()
    wanted = ["evaluate.metrics=[fd]", "sample.solver={name: euler, grid: [0.0, 1.0]}"]
    config = apply_overrides(run.config, wanted)
    card = read(evaluate(run.path, wanted))
    assert card["settings"] == card_settings(config, run.dataset)
    assert answers(card, card_settings(config, run.dataset))
    assert not answers(card, card_settings(run.config, run.dataset))
    assert card["sampling"]["solver"]["steps"] == 1


def test_other_settings_and_checkpoints_get_other_cards(make_run):
    run = make_run()
    quick = "evaluate.metrics=[fd]"
    cards = {
        evaluate(run.path, [quick]),
        evaluate(run.path, [quick, "sample.solver.steps=3"]),
        evaluate(run.path, [quick, "sample.guidance.scale=2.0"]),
        evaluate(run.path, [quick, "evaluate.weights=raw"]),
        evaluate(run.path, [quick, "evaluate.fid_num_images=30"]),
        evaluate(run.path, [quick, "evaluate.seed=1"]),
        evaluate(run.path, [quick], step=1),
    }
    assert len(cards) == 7
    assert len({read(path)["metrics"]["fd"] for path in cards}) == 7
    assert {read(path)["sampling"]["nfe"] for path in cards} == {2, 3, 4}


def test_a_card_of_weights_that_have_changed_is_made_again(make_run):
    run = make_run()
    path = evaluate(run.path, ["evaluate.metrics=[fd]"])
    first = read(path)
    average = run.checkpoint_path(2) / f"{averages_of(run.config)[0].name}.safetensors"
    average.write_bytes((run.checkpoint_path(1) / "model.safetensors").read_bytes())
    write_manifest(average.parent, {"step": 2})
    assert evaluate(run.path, ["evaluate.metrics=[fd]"]) == path
    assert read(path)["checkpoint"] != first["checkpoint"]
    assert read(path)["metrics"]["fd"] != first["metrics"]["fd"]


def test_an_adaptive_solver_is_told_by_its_tolerances_and_batches(make_run):
    overrides = ["sample.solver={name: dopri5, rtol: 1e-2, atol: 1e-2}"]
    sampling = read(evaluate(make_run().path, [*overrides, "evaluate.metrics=[fd]"]))["sampling"]
    assert sampling["solver"] == {"name": "dopri5", "atol": 0.01, "rtol": 0.01}
    assert sampling["batch_size"] == 256
    assert sampling["nfe"] > 5


def test_label_accuracy_needs_balanced_labels_and_a_conditional_model(make_run):
    metrics = read(evaluate(make_run().path, ["evaluate.labels=data"]))["metrics"]
    assert "label_accuracy" not in metrics


def test_an_unconditional_model_is_measured_without_labels(make_run):
    card = read(evaluate(make_run(class_conditional=False).path))
    assert card["sampling"]["labels"] is None
    assert "label_accuracy" not in card["metrics"]


def test_the_spectrum_needs_no_feature_space(tmp_path, write_images):
    """Data without classes have none by default."""
    data = ["data.name=folder", f"data.root={write_images(tmp_path / 'flat', {'': 12})}"]
    run = train(apply_overrides(make_config(tmp_path / "runs"), data))
    card = read(evaluate(run, ["evaluate.metrics=[spectrum]"]))
    assert card["metrics"]["spectrum_error"] > 0
    assert card["extractor"] == {}
    with pytest.raises(ValueError, match="has no classes to train a classifier on; use"):
        evaluate(run)


@pytest.mark.parametrize("key", ["train.steps", "data.image_size", "model.depth", "seed"])
def test_what_the_weights_depend_on_cannot_be_overridden(make_run, key):
    with pytest.raises(ValueError, match=f"override '{key}=8': the run is trained; only sample"):
        evaluate(make_run().path, [f"{key}=8"])


def test_the_number_of_images_in_training_grids_is_no_setting_of_an_evaluation(make_run):
    with pytest.raises(ValueError, match=r"sets the grids drawn in training; set evaluate.fid_num"):
        evaluate(make_run().path, ["sample.num_images=8"])


def test_other_images_than_the_runs_are_refused(make_run):
    run = make_run()
    info = read(run.path / "dataset.json") | {"fingerprint": "0" * 64}
    write_json(run.path / "dataset.json", sealed(info))
    with pytest.raises(ValueError, match="are not those it was trained on") as caught:
        evaluate(run.path)
    assert "\n" not in str(caught.value)
    assert not list((run.path / "evaluation").iterdir())


def test_nothing_is_downloaded_to_the_place_that_a_runs_config_names(make_run, tmp_path):
    run, place = make_run(), tmp_path / "place"
    data = [f"data.root={place}", "data.download=true"]
    config = apply_overrides(run.config, ["name=mnist", "data.name=mnist", *data])
    stranger = begin_run(config, run.dataset, {}, resume=False)
    save_random_checkpoint(stranger, 1)
    with pytest.raises(ValueError, match=r"mnist is not in .* data.download is false.*=true"):
        evaluate(stranger.path)
    assert not place.exists()


def test_label_rules():
    assert balanced_labels(5, 3).tolist() == [0, 1, 2, 0, 1]
    labels = torch.tensor([0, 0, 0, 1])
    assert labels_like_data(40, labels).bincount().tolist() == [30, 10]
    assert labels_like_data(6, labels)[:4].sort().values.tolist() == [0, 0, 0, 1]
    assert repeated_labels(5, [7, 2], 10).tolist() == [7, 2, 7, 2, 7]
    for wrong in ([10], [-1], []):
        with pytest.raises(ValueError, match=r"the model's labels are 0 to 9$"):
            repeated_labels(5, wrong, 10)


def test_a_card_is_strict_json_and_leaves_no_part_behind(tmp_path):
    write_json(tmp_path / "a" / "card.json", {"loss": float("nan"), "bins": (1.0, float("inf"))})
    assert read(tmp_path / "a" / "card.json") == {"loss": None, "bins": [1.0, None]}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["card.json"]


def test_the_floor_is_measured_once_for_all_that_it_depends_on(make_run):
    run = make_run()
    floors = cache_folder() / "floors"
    wanted = ["evaluate.metrics=[fd]", "evaluate.fid_num_images=37"]

    def floor(*overrides, **which):
        return read(evaluate(run.path, [*wanted, *overrides], **which))["floor"]

    before = set(floors.glob("*"))
    first = floor(step=1)
    (file,) = set(floors.glob("*")) - before
    assert read(file) == first
    stamp = file.stat().st_mtime_ns
    others = [{"step": 2}, {"step": 1, "force": True}]
    assert [floor(**which) for which in others] == [first, first]
    assert floor("sample.solver.steps=1", "evaluate.seed=1") == first
    assert file.stat().st_mtime_ns == stamp
    file.write_text("damaged")
    assert floor(step=1, force=True) == first == read(file)
    assert floor("evaluate.fid_num_images=38")["fd"] != first["fd"]
    assert floor("evaluate.metrics=[fd, spectrum]").keys() > first.keys()
