"""flowdopr in Python: the pages on it run, and its functions return what the commands write."""

import inspect
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_architecture import PACKAGE

import flowdopr
from flowdopr import api
from flowdopr.cli import run_command
from flowdopr.config import ConfigError, load_config, read_config
from flowdopr.disk import read_json
from flowdopr.flow import log_likelihood

DOCS = PACKAGE.parent / "docs"
SHORT = [
    *("train.steps=4", "train.warmup_steps=1", "train.validate_every=4", "train.sample_every=4"),
    *("evaluate.fid_num_images=64", "evaluate.gallery=0"),
]


def run_page(name: str) -> dict:
    """The names that the Python of a page leaves behind."""
    names: dict = {}
    text = (DOCS / name).read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(block, name, "exec"), names)
    return names


def test_flow_matching_in_thirty_lines():
    first = re.findall(r"```python\n(.*?)```", (DOCS / "thirty-lines.md").read_text(), re.S)[0]
    assert len([line for line in first.splitlines() if line]) <= 31
    radii = run_page("thirty-lines.md")["radii"]
    assert radii.mean() == pytest.approx(1, abs=0.1)
    assert radii.std() < 0.2


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the page on Python leaves behind, and its working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("python"))
        names = run_page("python.md")
        yield names, names["run"].absolute()


def test_samples_are_those_of_the_command(page, tmp_path):
    names, run = page
    options = ["--solver", "heun2", "--steps", "5", "--guidance-scale", "2", "--labels", "0-9"]
    command = ["sample", str(run), "--num", "10", "--seed", "1", "--out", str(tmp_path / "out")]
    assert run_command([*command, *options]) == 0
    x = names["x"]
    assert (x.shape, x.dtype) == ((10, 1, 8, 8), torch.float32)
    assert -1 <= x.min() < x.max() <= 1
    for number, picture in enumerate(names["pictures"]):
        written = Image.open(tmp_path / "out" / f"{number:06d}-{number}.png")
        assert np.array_equal(np.asarray(picture), np.asarray(written))
    model = flowdopr.load(run)
    named = model.sample(3, labels="7-9", seed=1)
    assert torch.equal(named, model.sample(3, labels=[7, "8", 9], seed=1))
    with pytest.raises(ValueError, match=r"labels \[10\]: the model's labels are 0 to 9"):
        model.sample(1, labels=[10])
    with pytest.raises(ValueError, match="at least one image"):
        model.sample(0)


def test_velocity_and_likelihood_are_those_of_the_flow(page):
    names, run = page
    model, x = flowdopr.load(run, weights="raw", step=40), names["x"][:2]
    y = torch.tensor([3, 4])
    with torch.no_grad():
        expected = model.module(x, torch.tensor([0.2, 0.2]), y)
    assert torch.equal(model.velocity(x, 0.2, y).detach(), expected)
    x.requires_grad_()
    assert torch.autograd.grad(model.velocity(x, 0.2, y).sum(), x)[0].abs().sum() > 0
    nats = model.log_likelihood(x.detach(), y, exact=True, atol=1e-3, rtol=1e-3)
    grid = torch.tensor([0.0, 1.0])
    velocity = partial(model.velocity, y=y)
    whole = log_likelihood(velocity, x.detach(), grid, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(nats, whole.log_prob, atol=0.05, rtol=1e-3)
    assert names["nats"].shape == (10,)


def test_the_card_is_returned(page):
    names, run = page
    (file,) = (run / "evaluation").glob("*.json")
    assert names["card"] == read_json(file, "")


@pytest.mark.slow
def test_a_study_returns_its_results(tmp_path):
    """Under a guard, because the processes of the runs import the script."""
    script = tmp_path / "study.py"
    script.write_text(
        "import flowdopr\n"
        "if __name__ == '__main__':\n"
        "    config = {'base': 'quickstart', 'compare': {'seeds': [0], 'arms': [\n"
        "        {'name': 'AdamW', 'lrs': [1e-3], 'set': {'optimizer.name': 'adamw'}}]}}\n"
        f"    short = {SHORT}\n"
        "    results = flowdopr.compare(config, short)\n"
        "    print(sorted(results))\n"
    )
    run = [sys.executable, str(script)]
    done = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True)
    results = read_json(tmp_path / "runs" / "quickstart" / "results.json", "")
    assert done.stdout.splitlines()[-1] == str(sorted(results))


@pytest.mark.parametrize(
    ("source", "overrides"),
    [
        ({"base": "quickstart"}, ["name=x"]),
        ({"base": "quickstart", "name": "x", "output": Path("runs")}, []),
        ("quickstart", ["name=x"]),
        (load_config("quickstart"), ["name=x"]),
    ],
)
def test_a_config_is_a_mapping_a_name_or_a_config(source, overrides):
    assert read_config(source, overrides) == load_config("quickstart", ["name=x"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"base": "nothing"}, "nothing: no such config file"),
        ({"base": "quickstart", "train": {"stepz": 1}}, "config: train.stepz: unknown"),
        ({"base": "quickstart", "seed": torch.ones(1)}, "config: .*; give what a YAML file can"),
    ],
)
def test_a_wrong_mapping_is_one_line(source, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(source)
    assert "\n" not in str(caught.value)


def test_the_names_at_the_top_are_lazy_typed_and_documented():
    code = "import sys, flowdopr, flowdopr.config; print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
    assert [callable(getattr(flowdopr, name)) for name in flowdopr.__all__] == [True] * 5
    functions = [getattr(api, name) for name in flowdopr.__all__ if name != "TrainedModel"]
    methods = [item for _, item in inspect.getmembers(api.TrainedModel, inspect.isfunction)]
    for function in [*functions, *methods]:
        signature = inspect.signature(function)
        assert function.__name__ == "__init__" or function.__doc__
        assert signature.return_annotation is not inspect.Signature.empty
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        flowdopr.nothing  # noqa: B018
