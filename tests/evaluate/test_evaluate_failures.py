"""What cannot be measured is refused in one line; what is damaged in a folder or cache is refused
or made again."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flowdopr.cli import run_command
from flowdopr.compare.cards import read_run
from flowdopr.compare.plan import RunPlan
from flowdopr.compare.progress import last_step
from flowdopr.compare.results import read_result
from flowdopr.config import apply_overrides
from flowdopr.data import Datasets, ImageTensor
from flowdopr.evaluate import classifier as module
from flowdopr.evaluate import evaluate
from flowdopr.evaluate.card import read_card
from flowdopr.evaluate.classifier import trained_classifier
from flowdopr.runs import averages_of
from flowdopr.runs.checkpoint import write_manifest

QUICK = ["evaluate.metrics=[fd]"]


@pytest.fixture
def broken_run(make_run):
    """Weights that are finite and whose rollouts of class 3 are not."""
    run = make_run()
    path = run.checkpoint_path(2) / f"{averages_of(run.config)[0].name}.safetensors"
    weights = load_file(path)
    (table,) = [name for name in weights if weights[name].shape[:1] == (11,)]
    weights[table][3] = 3e38
    save_file(weights, path)
    write_manifest(path.parent, {"step": 2})
    return run


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_rollouts_that_are_not_finite_are_no_images(broken_run, tmp_path, capsys, solver):
    run, out = str(broken_run.path), tmp_path / "out"
    commands = [
        ["sample", run, "--num", "20", "--out", str(out), "--solver", solver],
        ["evaluate", run, f"sample.solver={solver}", "evaluate.fid_num_images=20"],
    ]
    for command in commands:
        assert run_command(command) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"flowdopr: {run}: step 2: ")
        if solver == "euler":
            assert "2 of the images 0 to 19 are not finite (3, 13), because" in said
    assert not list(out.glob("*.png"))
    assert not list((broken_run.path / "evaluation").iterdir())
    assert run_command([*commands[0][:-2], "--labels", "0,1", "--solver", "euler"]) == 0


def test_a_damaged_checkpoint_is_refused_and_another_one_is_offered(make_run, tmp_path, capsys):
    run = make_run()
    path = run.checkpoint_path(2) / f"{averages_of(run.config)[0].name}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    commands = [["sample", str(run.path), "--num", "1", "--out", str(tmp_path / "out")]]
    commands.append(["evaluate", str(run.path), *QUICK])
    for command in commands:
        assert run_command(command) == 2
        [said] = capsys.readouterr().err.splitlines()
        assert said.startswith(f"flowdopr: {path}: is damaged: its SHA-256 is not the one in")
        assert "choose another by --step (1), or go on with flowdopr train --resume" in said
        assert run_command([*command, "--step", "1"]) == 0
        capsys.readouterr()


@pytest.fixture
def few_steps(monkeypatch, tmp_path):
    """Classifiers of the test's own, trained for 5 steps; the list of them."""
    full, trained = module.train_classifier, []

    def train(model, data):
        trained.append(full(model, data, steps=5))
        return trained[-1]

    monkeypatch.setattr(module, "train_classifier", train)
    monkeypatch.setenv("FLOWDOPR_CACHE", str(tmp_path / "cache"))
    return trained


def test_a_classifier_that_guesses_is_warned_of(digits, few_steps, make_run, capsys):
    shuffled = [
        ImageTensor(part.images, part.labels[torch.randperm(len(part.labels))])
        for part in (digits.train, digits.held_out)
    ]
    found = trained_classifier(Datasets(*shuffled, digits.info))
    assert found.chance == pytest.approx(0.1, abs=0.01)
    assert found.held_out_accuracy < 0.25
    assert "no better than a guess (10." in found.warning
    run = make_run()  # of the same fingerprint, and so measured by that classifier
    card = read_card(evaluate(run.path, QUICK))
    assert card["extractor"]["warning"] == found.warning
    assert card["extractor"]["chance"] == found.chance
    assert f"warning: {found.warning}" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "no notes", "other tensors", "not tensors"])
def test_a_damaged_classifier_is_trained_again(digits, few_steps, damage):
    path = trained_classifier(digits).path
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:-9])
    elif damage == "no notes":
        save_file(load_file(path), path)
    elif damage == "other tensors":
        notes = {"image_shape": [1, 8, 8], "num_classes": 10, "held_out_accuracy": 0.5}
        save_file({"a": torch.zeros(1)}, path, metadata={"flowdopr": json.dumps(notes)})
    else:
        path.write_bytes(b"[]")
    trained_classifier(digits)
    assert len(few_steps) == 2
    assert path.read_bytes() == whole


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FILES = st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode())


@pytest.fixture
def known(make_run):
    """A run, the path of its one card, and the card."""
    run = make_run()
    path = evaluate(run.path, QUICK)
    return run, path, read_card(path)


SLOW = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SLOW
@given(content=FILES)
def test_no_content_of_a_file_breaks_its_reader(tmp_path, content):
    for name in ("metrics.jsonl", "card.json"):
        (tmp_path / name).write_bytes(content + b"\n")
    assert read_card(tmp_path / "card.json") is None
    assert isinstance(last_step(tmp_path), int)


@SLOW
@given(data=st.data(), value=JSON)
def test_a_card_with_a_wrong_value_is_no_card_or_harmless(known, data, value):
    run, path, card = known
    place, keys = card, []
    while isinstance(place, dict) and place and (not keys or data.draw(st.booleans())):
        keys.append(data.draw(st.sampled_from(sorted(place))))
        place = place[keys[-1]]
    changed = json.loads(json.dumps(card))
    holder = changed
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    path.write_text(json.dumps(changed))
    result = read_result(read_run(RunPlan("arm", 1e-3, 0, apply_overrides(run.config, QUICK))))
    assert result.status in ("done", "failed", "unfinished")


@pytest.mark.parametrize("content", ["[]", "", '{"step": 2}', "{", "null", "edited"])
def test_a_damaged_or_edited_card_is_made_again(known, content):
    run, path, card = known
    if content == "edited":
        better = json.loads(path.read_text())
        better["metrics"]["one_step_loss"] /= 2
        content = json.dumps(better)
    path.write_text(content)
    assert read_card(path) is None
    assert evaluate(run.path, QUICK) == path
    assert read_card(path)["metrics"] == card["metrics"]
