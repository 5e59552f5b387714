"""A model and a data set of the user's own: allowed by the environment alone, and then used as any
other."""

import json
import sys
from pathlib import Path

import pytest
from test_train_processes import train_on_two
from tiny import assert_same_checkpoint, tiny, tiny_file

import flowdopr
from flowdopr.cli import run_command
from flowdopr.config import ConfigError, load_config
from flowdopr.disk import file_sha256
from flowdopr.export import export
from flowdopr.latents import build_datasets
from flowdopr.models import build_model
from flowdopr.train import train

MODULE = """
import numpy as np
import torch
from pathlib import Path
from torch import nn

with Path("imported.txt").open("a") as file:
    file.write("imported ")


class Net(nn.Module):
    def __init__(self, image_shape, num_classes, width=8):
        super().__init__()
        self.label = nn.Embedding(num_classes + 1, width)
        self.first = nn.Conv2d(image_shape[0], width, 3, padding=1)
        self.inner = nn.Linear(width, width)
        self.last = nn.Conv2d(width, image_shape[0], 3, padding=1)

    def forward(self, x, t, y):
        label = 0 if y is None else self.label(y)
        h = self.first(x) + (label + t[:, None])[:, :, None, None]
        return self.last(torch.relu(self.inner(h.movedim(1, -1))).movedim(-1, 1))


class Tied(Net):
    def __init__(self, **given):
        super().__init__(**given)
        self.again = nn.Linear(self.inner.in_features, self.inner.out_features)
        self.again.weight = self.inner.weight

    def forward(self, x, t, y):
        return super().forward(x, t, y) + self.again(self.first(x).movedim(1, -1)).mean()


class Flat(Net):
    def forward(self, x, t, y):
        return super().forward(x, t, y).flatten(1)


class NoNull(Net):
    def forward(self, x, t, y):
        return super().forward(x, t, nn.functional.one_hot(y, self.num_classes).argmax(1))


class Other(Net):
    num_classes = 3


def broken(image_shape, num_classes):
    raise RuntimeError("no such\\nfile")


def text(**given):
    return "text"


def data(seed=0, channels=1, classes=3):
    noise = np.random.default_rng(seed)
    return tuple(
        (noise.integers(0, 256, (n, channels, 8, 8), np.uint8), np.arange(n) % classes)
        for n in (40, 10)
    )


def plain():
    return [(images, None) for images, _ in data()]


def one():
    return data()[0]


def floats():
    return [(images / 255, labels) for images, labels in data()]


def long():
    return [(images, labels[:-1]) for images, labels in data()]


def halves():
    return [(images, labels / 2) for images, labels in data()]


def half_labelled():
    (images, labels), (others, _) = data()
    return (images, labels), (others, None)


def colours():
    return data()[0], data(channels=3)[1]
"""
DATA = "data={name: own, factory: 'mine:data'}"
MODEL = "model={name: own, factory: 'mine:Net', options: {width: 4}}"
PLAIN = "data={name: own, factory: 'mine:plain'}"
MEASURED = ["evaluate.metrics=[spectrum]", "evaluate.fid_num_images=20"]
BOTH = [DATA, MODEL, "optimizer={name: muon, lr: 3e-3, dopr: {damping: 0.1}}"]


@pytest.fixture(autouse=True)
def _module(own_module, monkeypatch):
    own_module("mine", MODULE)
    monkeypatch.setenv("FLOWDOPR_CODE", "mine:Net,mine:data")


def test_a_resumed_run_equals_the_straight_one_and_names_its_code(tmp_path):
    straight = train(tiny(tmp_path, *BOTH, "name=straight"))
    train(tiny(tmp_path, *BOTH, "name=cut", "train.steps=3"))
    cut = train(tiny(tmp_path, *BOTH, "name=cut"), resume=True)
    assert_same_checkpoint(straight, cut, 8)
    sha256 = file_sha256("mine.py")
    made_by = json.loads((cut / "versions.json").read_text())
    assert made_by["code"] == {"mine:Net": sha256, "mine:data": sha256}
    roles = (cut / "log.txt").read_text()
    assert "inner.weight  4 x 4          matrix     full" in roles
    with pytest.raises(ConfigError, match=r"the images in data.factory=mine:data are not those"):
        train(tiny(tmp_path, *BOTH, "name=cut", "data.options={seed: 1}"), resume=True)
    with pytest.raises(ConfigError, match=r"model.options.width was 4, now 5"):
        train(tiny(tmp_path, *BOTH, "name=cut", "model.options={width: 5}"), resume=True)


@pytest.mark.slow
def test_two_processes_train_it(tmp_path):
    run = train_on_two(tmp_path, *BOTH, "train.steps=2")
    assert json.loads((run / "versions.json").read_text())["code"].keys() == {
        "mine:Net",
        "mine:data",
    }


def code_of_card(run):
    (card,) = (run / "evaluation").glob("*.json")
    return json.loads(card.read_text())["code"]


@pytest.mark.parametrize("factory", ["mine:Net", "mine:Tied"])
def test_a_run_is_measured_drawn_from_and_exported(tmp_path, monkeypatch, factory):
    monkeypatch.setenv("FLOWDOPR_CODE", f"{factory},mine:plain")
    run = train(
        tiny(tmp_path, f"model={{name: own, factory: '{factory}'}}", PLAIN, "train.steps=2")
    )
    assert run_command(["evaluate", str(run), *MEASURED]) == 0
    assert code_of_card(run) == dict.fromkeys((factory, "mine:plain"), file_sha256("mine.py"))
    assert run_command(["sample", str(run), "--num", "2", "--out", str(tmp_path / "drawn")]) == 0
    assert len(list((tmp_path / "drawn").glob("0*.png"))) == 2
    exported = export(run, tmp_path / "exported") / "model.safetensors"
    assert flowdopr.load(exported).sample(2).shape == (2, 1, 8, 8)


@pytest.mark.slow
def test_the_processes_of_a_study_use_them(tmp_path):
    path, settings = tiny_file(tmp_path, *BOTH, "evaluate={metrics: [fd], fid_num_images: 20}")
    study = "compare={seeds: [0], arms: [{name: A, lrs: [1e-3]}, {name: B, lrs: [2e-3]}]}"
    assert run_command(["compare", str(path), *settings, study]) == 0
    run = tmp_path / "runs" / "tiny" / "A-lr0.001-s0"
    assert code_of_card(run).keys() == {"mine:Net", "mine:data"}


@pytest.mark.parametrize("allowed", ["", "mine:text, mine:Nets", "mine", "*"])
def test_what_the_environment_does_not_list_is_not_imported(tmp_path, monkeypatch, capsys, allowed):
    path, settings = tiny_file(tmp_path, *BOTH, "train.steps=1")
    run = train(load_config(path, settings))
    exported = export(run, tmp_path / "exported") / "model.safetensors"
    monkeypatch.setenv("FLOWDOPR_CODE", allowed)
    del sys.modules["mine"]
    Path("imported.txt").unlink()
    study = ["compare={seeds: [0], arms: [{name: A, lrs: [1e-3]}]}", "name=study"]
    study += [setting for setting in settings if "lr:" not in setting]
    for command, place in (
        (["train", str(path), *settings, "--resume"], "data.factory: mine:data"),
        (["compare", str(path), *study], "data.factory: mine:data"),
        (["sample", str(run), "--out", str(tmp_path / "drawn")], f"{run}: model.factory: mine:Net"),
        (["sample", str(exported), "--out", "drawn"], f"{exported}: model.factory: mine:Net"),
        (["evaluate", str(run)], f"{run}: model.factory: mine:Net"),
        (["evaluate", str(run), "--save-reference", "x.npz"], f"{run}: data.factory: mine:data"),
        (["export", str(run), "--out", str(tmp_path / "new")], f"{run}: model.factory: mine:Net"),
    ):
        assert run_command(command) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"flowdopr: {place} is code, and FLOWDOPR_CODE does not list it; if")
        listed = [*allowed.replace(",", " ").split(), place.rpartition(" ")[2]]
        assert line.endswith(f"set FLOWDOPR_CODE={','.join(listed)}")
    with pytest.raises(ConfigError, match=r"model.factory: mine:Net is code"):
        flowdopr.load(run)
    assert run_command(["status", str(run)]) == 0
    assert not Path("imported.txt").exists()


@pytest.mark.parametrize(
    ("factory", "line"),
    [
        (
            "not_there:make",
            "cannot be imported: ModuleNotFoundError: No module named 'not_there'; ",
        ),
        ("mine:made", "cannot be imported: AttributeError: module 'mine' has no attribute 'made'"),
        ("mine:broken", "fails: RuntimeError: no such file; correct it, or model.options"),
        ("mine:data", r"fails: TypeError: data\(\) got an unexpected keyword argument 'image_shap"),
        ("mine:text", "returns a str; let it return an nn.Module"),
        ("mine:Other", "its model has num_classes 3; the data have 10"),
        ("mine:Flat", r"its model maps \(2, 1, 8, 8\) to torch.Size\(\[2, 64\]\); keep the shape"),
        ("mine:NoNull", r"its model\(x, t, y\) fails: RuntimeError: .*; it must take .* 0 to 10"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_in_one_line(tmp_path, monkeypatch, factory, line):
    monkeypatch.setenv("FLOWDOPR_CODE", factory)
    with pytest.raises(ConfigError, match=f"^model.factory: {factory}:? {line}") as caught:
        build_model(tiny(tmp_path, f"model={{name: own, factory: '{factory}'}}"), (1, 8, 8), 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("one", "ValueError: not enough values|ValueError: too many values"),
        ("text", "ValueError"),
        ("floats", r"images are torch.float64 \(40, 1, 8, 8\) in place of uint8 \(N, 1 or 3, H, W"),
        ("long", r"\(39,\) labels of \(40, 1, 8, 8\) images"),
        ("halves", "labels are whole numbers from 0"),
        ("half_labelled", "one of the two has no labels"),
        ("colours", "the two have images of different shapes"),
    ],
)
def test_data_that_cannot_be_used_are_refused_in_one_line(tmp_path, monkeypatch, function, line):
    monkeypatch.setenv("FLOWDOPR_CODE", f"mine:{function}")
    config = tiny(tmp_path, f"data={{name: own, factory: 'mine:{function}'}}")
    with pytest.raises(ConfigError, match=rf"^data.factory: mine:{function} must .*({line})") as e:
        build_datasets(config)
    assert "\n" not in str(e.value)


def test_images_without_labels_and_of_another_size(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWDOPR_CODE", "mine:plain")
    own = "data={name: own, factory: 'mine:plain', image_size: 16, channels: 3}"
    found = build_datasets(tiny(tmp_path, own))
    assert found.info.image_shape == (3, 16, 16)
    assert (found.info.num_classes, found.info.num_train, found.info.num_held_out) == (0, 40, 10)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["data={name: own}"], "data.name=own needs data.factory: MODULE:FUNCTION"),
        (["data.factory=mine:data"], "data.factory=mine:data is not used by data.name=digits"),
        (["model.name=own"], "model.factory: missing"),
        (["model={name: own, factory: mine.Net}"], "model.factory: must be MODULE:FUNCTION"),
        (["model={name: own, factory: 'mine:Net', width: 3}"], "model.width: own has no such"),
    ],
)
def test_settings_that_name_no_function_are_refused(tmp_path, settings, line):
    with pytest.raises(ConfigError, match=line):
        tiny(tmp_path, *settings)
