"""Samples as files: image i is a matter of (seed, i), and a folder appears whole or not at all."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from flowdopr.cli import run_command
from flowdopr.evaluate import evaluate, sample
from flowdopr.evaluate.draw import grid

MIDPOINT = "sample.solver={name: midpoint, steps: 3}"


def pixels(folder, index):
    return np.asarray(Image.open(folder / f"{index:06d}.png")).astype(int)


def test_a_folder_of_samples(make_run, tmp_path):
    run, out = make_run(), tmp_path / "deep" / "out"
    assert sample(run.path, [MIDPOINT], num=12, out=out, npz=True) == out
    names = {path.name for path in out.iterdir()}
    assert names == {f"{i:06d}.png" for i in range(12)} | {
        *("grid.png", "sampling.json", "samples.npz")
    }
    arrays = np.load(out / "samples.npz")
    assert (arrays["arr_0"].shape, arrays["arr_0"].dtype) == ((12, 8, 8, 1), np.uint8)
    assert arrays["labels"].tolist() == [*range(10), 0, 1]
    assert np.array_equal(arrays["arr_0"][5, :, :, 0], pixels(out, 5))
    card = json.loads((out / "sampling.json").read_text())
    assert card["sampling"]["nfe"] == 6
    assert (card["step"], card["weights"], card["sampling"]["labels"]) == (2, "ema", "balanced")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("solver", ["euler", "dopri5"])  # dopri5: as its tolerance is small
def test_image_i_depends_on_the_seed_and_i_alone(make_run, tmp_path, solver):
    run, solver = make_run(), f"sample.solver={solver}"
    many = sample(run.path, [solver, "sample.batch_size=5"], num=13, out=tmp_path / "many")
    few = sample(run.path, [solver, "sample.batch_size=64"], num=4, out=tmp_path / "few")
    other = sample(run.path, [solver], num=4, out=tmp_path / "other", seed=1)
    for index in range(4):
        assert np.abs(pixels(many, index) - pixels(few, index)).max() <= 1
        assert np.abs(pixels(other, index) - pixels(few, index)).max() > 9


def test_labels_weights_and_checkpoint_matter(make_run, tmp_path):
    run = make_run()
    choices = [
        {},
        {"labels": [3]},
        {"weights": "raw"},
        {"step": 1},
        {"overrides": ["sample.guidance.scale=3"]},
    ]
    folders = [
        sample(run.path, num=1, out=tmp_path / str(number), **choice)
        for number, choice in enumerate(choices)
    ]
    assert len({pixels(folder, 0).tobytes() for folder in folders}) == len(choices)


def test_a_folder_with_files_is_refused_and_an_empty_one_taken(make_run, tmp_path):
    run, out = make_run(), tmp_path / "out"
    out.mkdir()
    sample(run.path, num=1, out=out)
    with pytest.raises(ValueError, match=r"out: holds files already; give a new or an empty"):
        sample(run.path, num=1, out=out)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"labels": [10]}, "labels are 0 to 9"),
        ({"overrides": ["sample.solver=nonsense"]}, "unknown name 'nonsense'"),
        ({"overrides": ["sample.solver.steps=0"]}, "sample.solver.steps"),
        ({"step": 7}, "no checkpoint at step 7; there are: 1, 2"),
        ({"num": 0}, "at least one image"),
    ],
)
def test_a_wrong_request_is_one_line_and_writes_nothing(make_run, tmp_path, wrong, message):
    run, out = make_run(), tmp_path / "out"
    with pytest.raises(ValueError, match=message) as caught:
        sample(run.path, **({"num": 2, "out": out} | wrong))
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_any_setting_of_the_section_can_be_overridden(make_run, tmp_path):
    run, times = make_run(), "sample.solver={name: euler, grid: [0.0, 0.2, 1.0]}"
    command = ["sample", str(run.path), "--num", "2", "--out"]
    assert run_command([*command, str(tmp_path / "cli"), times, "--guidance-scale", "2"]) == 0
    card = json.loads((tmp_path / "cli" / "sampling.json").read_text())["sampling"]
    assert card["solver"]["grid"]["times"] == [0.0, 0.2, 1.0]
    assert card["guidance"]["scale"] == 2.0
    plain = sample(run.path, ["sample.guidance.scale=2"], num=2, out=tmp_path / "plain")
    assert not np.array_equal(pixels(plain, 0), pixels(tmp_path / "cli", 0))


def test_options_are_settings_with_the_overrides_after_them(make_run, tmp_path):
    run, out = make_run(), tmp_path / "out"
    command = ["sample", str(run.path), "--out", str(out), "--num", "1", "--batch-size", "3"]
    options = ["--solver", "dopri5", "--rtol", "1e-2", "sample.solver.atol=0.1"]
    assert run_command([*command, *options]) == 0
    card = json.loads((out / "sampling.json").read_text())["sampling"]
    assert card["solver"] == {"name": "dopri5", "atol": 0.1, "rtol": 0.01}
    assert card["batch_size"] == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.seed=3", r"override 'evaluate.seed=3': only sample\.\* can change what a run"),
        ("flow.path=cosine", r"only sample\.\* can change"),
        ("sample.num_images=9", "it sets the grids drawn in training; give --num"),
        ("sample.solver.stepz=3", "solver.stepz: euler has no such setting; did you mean 'steps'"),
        ("sample.guidance.interval=[0.5, 0.2]", "need 0 <= low < high <= 1"),
    ],
)
def test_a_wrong_override_is_one_line(make_run, tmp_path, capsys, override, message):
    out = tmp_path / "out"
    command = ["sample", str(make_run().path), "--out", str(out), "--guidance-scale", "2"]
    assert run_command([*command, override]) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(message, said)
    assert "\n" not in said
    assert not out.exists()


def test_small_images_are_magnified_in_the_grid():
    images = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    picture = grid(images)
    assert picture.shape == (3, 3 * 34 + 2, 3 * 34 + 2)
    assert torch.equal(picture[0, 2:34:4, 2:34:4], images[0, 0])


def test_two_processes_draw_and_measure_what_one_does(make_run, tmp_path):
    run = make_run()
    alone = sample(run.path, num=7, out=tmp_path / "alone")
    wanted = ["evaluate.metrics=[fd]", "evaluate.fid_num_images=9"]
    card = evaluate(run.path, wanted)
    fd = json.loads(card.read_text())["metrics"]["fd"]
    card.unlink()
    program = (
        "import sys; from flowdopr.evaluate import evaluate, sample; "
        "sample(sys.argv[1], num=7, out=sys.argv[2]); "
        f"evaluate(sys.argv[1], {wanted})"
    )
    script = tmp_path / "both.py"
    script.write_text(program)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [sys.executable, *launcher, str(script), str(run.path), str(tmp_path / "both")],
        check=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        timeout=120,
    )
    for index in range(7):
        gap = np.abs(pixels(alone, index) - pixels(tmp_path / "both", index)).max()
        assert gap <= 1
    assert list(card.parent.iterdir()) == [card]
    assert json.loads(card.read_text())["metrics"]["fd"] == pytest.approx(fd, rel=1e-2)
