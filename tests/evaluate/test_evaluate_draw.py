"""Samples as files: image i is a matter of (seed, i), and a cut sampling goes on."""

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
from flowdopr.data import to_uint8
from flowdopr.disk import write_json
from flowdopr.evaluate import Gallery, draw, evaluate, sample
from flowdopr.evaluate.generate import ImageSampler, label_numbers
from flowdopr.flow import image_generator
from flowdopr.pictures import grid

MIDPOINT = "sample.solver={name: midpoint, steps: 3}"


def pixels(folder, index):
    (path,) = folder.glob(f"{index:06d}*.png")
    return np.asarray(Image.open(path)).astype(int)


def test_a_folder_of_samples(make_run, tmp_path):
    run, out = make_run(), tmp_path / "deep" / "out"
    assert sample(run.path, [MIDPOINT], num=12, out=out, npz=True) == out
    names = {path.name for path in out.iterdir()}
    assert names == {f"{i:06d}-{i % 10}.png" for i in range(12)} | {
        *("grid.png", "sampling.json", "samples.npz")
    }
    arrays = np.load(out / "samples.npz")
    assert (arrays["arr_0"].shape, arrays["arr_0"].dtype) == ((12, 8, 8, 1), np.uint8)
    assert arrays["arr_1"].tolist() == [*range(10), 0, 1]
    assert np.array_equal(arrays["arr_0"][5, :, :, 0], pixels(out, 5))
    card = json.loads((out / "sampling.json").read_text())
    assert card["sampling"]["nfe"] == 6
    assert (card["step"], card["weights"], card["sampling"]["labels"]) == (2, "ema", "balanced")
    assert card["sampling"]["batch_size"] == 256
    assert card["images"]["000011-1.png"] == 1
    assert card["class_names"] == [str(i) for i in range(10)]


@pytest.mark.parametrize("solver", ["euler", "dopri5"])  # dopri5: as its tolerance is small
def test_image_i_depends_on_the_seed_and_i_alone(make_run, tmp_path, solver):
    run, solver = make_run(), f"sample.solver={solver}"
    many = sample(run.path, [solver, "sample.batch_size=5"], num=13, out=tmp_path / "many")
    few = sample(run.path, [solver, "sample.batch_size=64"], num=4, out=tmp_path / "few")
    other = sample(run.path, [solver], num=4, out=tmp_path / "other", seed=1)
    for index in range(4):
        assert np.abs(pixels(many, index) - pixels(few, index)).max() <= 1
        assert np.abs(pixels(other, index) - pixels(few, index)).max() > 9


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
@pytest.mark.parametrize("labels", [None, "3-5,9"])
def test_single_images_are_drawn_again_as_a_large_run_drew_them(make_run, tmp_path, solver, labels):
    """With dopri5, which chooses its steps for a batch, all others of their batch are drawn too."""
    run, request = make_run(), {"labels": labels, "seed": 4}
    overrides = [f"sample.solver={solver}", "sample.batch_size=3"]
    many = contents(sample(run.path, overrides, num=12, out=tmp_path / "many", **request))
    out = sample(
        run.path, overrides, numbers="10,2,7-8", out=tmp_path / "some", **request, npz=True
    )
    few = contents(out)
    pngs = sorted(name for name in few if re.match(r"\d", name))
    assert [name[:6] for name in pngs] == ["000002", "000007", "000008", "000010"]
    assert all(few[name] == many[name] for name in pngs)
    assert json.loads(few["sampling.json"])["sampling"]["numbers"] == [10, 2, 7, 8]
    assert np.array_equal(np.load(out / "samples.npz")["arr_0"][0, :, :, 0], pixels(out, 10))


@pytest.mark.parametrize(
    ("labels", "found"),
    [("3", [3]), ("0-2,cat", [0, 1, 2, 1]), ("owl, grey", [2]), (["cat", 0], [1, 0])],
)
def test_labels_are_numbers_ranges_and_names(labels, found):
    assert label_numbers(labels, ["dog", "cat", "owl, grey"]) == found


@pytest.mark.parametrize("labels", ["2-0", "1,2-0"])
def test_a_range_of_labels_that_goes_down_is_refused(labels):
    with pytest.raises(ValueError, match=r"no class is called '2-0'; give class numbers, 0-9"):
        label_numbers(labels, ["dog", "cat", "owl"])


def test_classes_named_by_a_stranger_cannot_leave_the_folder(tmp_path, digits, make_run):
    run = make_run()
    names = ("../../up", "a/b", ".", "x" * 300, *map(str, range(6)))
    write_json(run.path / "dataset.json", run.dataset.to_dict() | {"class_names": list(names)})
    out = sample(run.path, num=4, out=tmp_path / "out")
    assert sorted(path.name for path in out.glob("0*")) == [
        *("000000-_up.png", "000001-a_b.png", "000002-_.png", f"000003-{'x' * 40}.png")
    ]


@pytest.mark.parametrize("solver", ["midpoint", "dopri5", "euler_maruyama"])
def test_a_trajectory_leads_from_noise_to_the_images(make_run, tmp_path, solver):
    request = {"overrides": [f"sample.solver={solver}"], "num": 4, "out": tmp_path / "out"}
    sample(make_run().path, **request)
    out = sample(tmp_path / "tiny", **request, trajectory=True)
    way = np.asarray(Image.open(out / "trajectory.png"))[..., 0].astype(int)
    rows = way[2:].reshape(8, 34, -1)[:, :32:4].reshape(8, 8, -1)  # undo margins and magnification
    columns = rows[..., 2:].reshape(8, 8, -1, 34)[..., :32:4]
    first = to_uint8(torch.randn(1, 8, 8, generator=image_generator(0, 0)))[0].numpy()
    assert np.abs(columns[0, :, 0] - first).max() <= 1
    for index in range(4):
        ends = columns[2 * index : 2 * index + 2, :, -1]
        assert np.abs(ends - pixels(out, index)).max() <= 1


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


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def images_only(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".png")}


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("solver", "damage"),
    [("euler", None), *(("dopri5", damage) for damage in ("cut", "missing", "no note", None))],
)
def test_a_cut_sampling_goes_on(make_run, tmp_path, monkeypatch, solver, damage):
    """With dopri5 an image depends on the others that it is drawn with."""
    run, overrides = make_run(), [f"sample.solver={solver}", "sample.batch_size=3"]
    request = {"overrides": overrides, "num": 10, "npz": True}
    alone = sample(run.path, out=tmp_path / "alone", **request)
    out = tmp_path / "cut"
    save, saved = draw.to_pil_image, []

    def stopping(image):  # at the second image of the third batch
        saved.append(image)
        return save(image) if len(saved) < 8 else interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(draw, "to_pil_image", stopping)
        with pytest.raises(KeyboardInterrupt):
            sample(run.path, out=out, **request)
    assert not (out / "sampling.json").exists()
    assert sorted(images_only(out)) == [f"{i:06d}-{i}.png" for i in range(7)]
    damaged = out / "000001-1.png"
    if damage == "cut":
        damaged.write_bytes(damaged.read_bytes()[:-1])
    elif damage == "missing":
        damaged.unlink()
    elif damage == "no note":
        (out / "unfinished" / "00000000.json").write_text("[]")
    drawn, whole = [], ImageSampler.draw

    def noted(self, batch, *args, **kwargs):
        drawn.append(batch[0])
        return whole(self, batch, *args, **kwargs)

    monkeypatch.setattr(ImageSampler, "draw", noted)
    assert sample(run.path, out=out, **request) == out
    assert drawn == ([0] if damage else []) + [6, 9]
    assert contents(out) == contents(alone)
    assert sample(run.path, out=out, **request) == out
    assert len(drawn) == 2 + bool(damage)


def test_a_finished_sampling_can_still_get_its_npz(make_run, tmp_path):
    run, out = make_run(), tmp_path / "out"
    sample(run.path, num=2, out=out)
    sample(run.path, num=2, out=out, npz=True)
    assert np.load(out / "samples.npz")["arr_0"].shape == (2, 8, 8, 1)
    (out / "samples.npz").unlink()
    (out / "000001-1.png").unlink()
    with pytest.raises(ValueError, match=r"000001-1.png: is missing; draw the images anew"):
        sample(run.path, num=2, out=out, npz=True)


@pytest.mark.parametrize(
    ("change", "message", "finished"),
    [
        ({"seed": 1}, "sampling.seed was 0, now 1", True),
        ({"num": 5}, "sampling.num_images was 4, now 5", False),
        ({"labels": [3]}, "sampling.labels was balanced, now [3]", True),
        ({"step": 1}, "checkpoint.sha256 was", False),
        ({"overrides": ["sample.batch_size=2"]}, "sampling.batch_size was 1, now 2", False),
    ],
)
def test_images_of_other_settings_are_refused(
    make_run, tmp_path, monkeypatch, finished, change, message
):
    run, out = make_run(), tmp_path / "out"
    request = {"overrides": ["sample.batch_size=1"], "num": 4, "out": out}
    if finished:
        sample(run.path, **request)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(draw, "_finish", interrupt)
            with pytest.raises(KeyboardInterrupt):
                sample(run.path, **request)
    before = contents(out) if finished else images_only(out)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        sample(run.path, **(request | change))
    assert re.fullmatch(
        r".*out: holds images of other settings: .*; give a new folder", str(caught.value)
    )
    assert (contents(out) if finished else images_only(out)) == before


def test_a_folder_with_other_files_is_refused_and_an_empty_one_taken(make_run, tmp_path):
    run, out = make_run(), tmp_path / "out"
    out.mkdir()
    sample(run.path, num=1, out=out)
    (out / "sampling.json").write_text("[]")
    for place in (out, tmp_path / "out" / "000000-0.png"):
        with pytest.raises(ValueError, match=r"holds files already; give a new or an empty"):
            sample(run.path, num=1, out=place)


def test_two_samplings_into_one_folder_are_refused(make_run, tmp_path):
    run, out = make_run(), tmp_path / "out"
    code = f"""if True:
        from pathlib import Path
        from flowdopr.disk import locked
        with locked(Path({str(out / "unfinished")!r}), ""):
            input(print("locked", flush=True))
    """
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match="is at work here; wait for it, or give another"):
            sample(run.path, num=1, out=out)
        other.communicate(b"\n")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"labels": [10]}, "labels are 0 to 9"),
        ({"overrides": ["sample.solver=nonsense"]}, "unknown name 'nonsense'"),
        ({"overrides": ["sample.solver.steps=0"]}, "sample.solver.steps"),
        ({"step": 7}, "no checkpoint at step 7; there are: 1, 2"),
        ({"num": 0}, "at least one image"),
        ({"numbers": [3]}, "num=2 beside the numbers of images: give one of the two"),
        *(
            ({"num": None, "numbers": n}, "give numbers of 0")
            for n in ("", "3-1", "x", "3,3", [-1])
        ),
        ({"labels": "tree"}, "no class is called 'tree'; give class numbers, 0-9 or class names"),
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


@pytest.mark.slow
def test_two_processes_draw_and_measure_what_one_does(make_run, tmp_path):
    """Images bit for bit, also with a solver whose steps depend on the batch; metrics, which add up
    sums of the processes, to rounding."""
    run, wanted = make_run(), ["sample.solver=dopri5", "sample.batch_size=2"]
    alone = sample(run.path, wanted, num=7, out=tmp_path / "alone")
    measured = [*wanted, "evaluate.metrics=[fd, kid, isc, prc, spectrum]"]
    measured += ["evaluate.fid_num_images=9"]
    card = evaluate(run.path, measured)
    metrics, gallery = json.loads(card.read_text())["metrics"], Gallery.beside(card)
    pictures = gallery.read_bytes()
    card.unlink()
    gallery.unlink()
    script = tmp_path / "both.py"
    script.write_text(
        "import sys; from flowdopr.evaluate import evaluate, sample; "
        f"sample(sys.argv[1], {wanted}, num=7, out=sys.argv[2]); "
        f"evaluate(sys.argv[1], {measured})"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [sys.executable, *launcher, str(script), str(run.path), str(tmp_path / "both")],
        check=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        timeout=250,
    )
    assert contents(tmp_path / "both") == contents(alone)
    assert set(card.parent.iterdir()) == {card, gallery}
    assert gallery.read_bytes() == pictures
    again = json.loads(card.read_text())["metrics"]
    assert again.keys() == metrics.keys()
    for name, value in metrics.items():
        expected = None if value is None else pytest.approx(value, rel=1e-6)
        assert again[name] == expected, name
