"""Files of mean and covariance: as other packages have them, in place of the real images."""

import json
from importlib import import_module

import numpy as np
import pytest
import scipy.linalg
import torch

from flowdopr.cli import run_command
from flowdopr.disk import file_sha256
from flowdopr.evaluate import Evaluator, evaluate
from flowdopr.evaluate.moments import Moments

WANTED = ["evaluate.metrics=[fd,fd_by_images]", "evaluate.gallery=3"]


def test_the_distance_is_that_of_pytorch_fid(monkeypatch):
    score, root = pytest.importorskip("pytorch_fid.fid_score"), scipy.linalg.sqrtm
    # It asks for an error estimate that newer versions of SciPy no longer give.
    monkeypatch.setattr(score.linalg, "sqrtm", lambda matrix, disp=True: (root(matrix), None))
    features = [scale * torch.randn(300, 20).double() + scale for scale in (1.0, 1.3)]
    ours = [Moments.of(part).statistics() for part in features]
    theirs = [(part.numpy().mean(0), np.cov(part.numpy(), rowvar=False)) for part in features]
    expected = score.calculate_frechet_distance(*theirs[0], *theirs[1])
    assert ours[0].distance(ours[1]) == pytest.approx(expected, rel=1e-6)


def test_statistics_that_were_written_give_the_same_distance(make_run, tmp_path, capsys):
    run, file = make_run(), tmp_path / "new" / "digits.npz"
    assert run_command(["evaluate", str(run.path), f"--save-reference={file}", "--step=1"]) == 2
    assert "leave --step and --force out" in capsys.readouterr().err
    assert run_command(["evaluate", str(run.path), f"--save-reference={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        f"flowdopr: {tmp_path}: is a folder; name a file to write, such as "
        f"{tmp_path}/reference.npz\n"
    )
    assert run_command(["evaluate", str(run.path), f"--save-reference={file}"]) == 0
    with np.load(file, allow_pickle=False) as stored:
        assert {"mu", "sigma"} <= set(stored)
        assert stored["sigma"].shape == 2 * stored["mu"].shape
    own, other = (
        evaluate(run.path, [*WANTED, *more]) for more in ([], [f"evaluate.reference={file}"])
    )
    assert own != other
    own, other = (json.loads(path.read_text()) for path in (own, other))
    for part in ("metrics", "floor"):
        assert other[part] == own[part]
    assert other["reference"] == {"name": "digits.npz", "sha256": file_sha256(file)}
    assert other["settings"]["statistics"] == file_sha256(file)
    assert other["gallery"]["nearest_ratio"] is None  # the training images are not looked at


def test_a_file_with_other_statistics_gives_another_distance(make_run, tmp_path):
    """Without naming its network, as files of other packages do."""
    run, file = make_run(), tmp_path / "other.npz"
    Evaluator(run.path).save_reference(file)
    stored = dict(np.load(file))
    np.savez(file, mu=stored["mu"].astype(np.float32) + 1, sigma=stored["sigma"])
    own, other = (
        evaluate(run.path, [*WANTED, *more]) for more in ([], [f"evaluate.reference={file}"])
    )
    own, other = (json.loads(path.read_text())["floor"]["fd"] for path in (own, other))
    assert other > own + len(stored["mu"]) / 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"mu": np.zeros(3), "sigma": np.eye(3)},
            r"other.npz is of 3 features, .* has \d+; choose",
        ),
        (
            {"mu": np.zeros((2, 3)), "sigma": np.eye(3)},
            r"its mu is \[2, 3\] and its sigma \[3, 3\]",
        ),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "numbers that are not finite"),
        ({"mu": np.zeros(3), "sigma": np.tri(3)}, "sigma is not symmetric"),
        ({"mu": np.zeros(3), "sigma": -np.eye(3)}, "or has negative variances"),
        ({"mu": np.zeros(3), "sigma": 1j * np.eye(3)}, "is damaged: Cannot cast"),
        ({"mu": np.zeros(3)}, "is damaged: .*sigma.*; let evaluate.reference name an npz file"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, "is damaged: .*allow_pickle"),
        (b"text", "is damaged: File is not a zip file; let"),
        (None, "other.npz: is missing; let evaluate.reference"),
        ("network", "is of another network than"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_images_are_drawn(
    make_run, tmp_path, monkeypatch, content, words
):
    run, file = make_run(), tmp_path / "other.npz"
    if content == "network":
        Evaluator(run.path).save_reference(file)
        np.savez(file, **dict(np.load(file)) | {"weights_sha256": "0" * 64})
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.savez(file, **content)
    monkeypatch.delattr(import_module("flowdopr.evaluate.generate").ImageSampler, "draw")
    with pytest.raises(ValueError, match=words) as error:
        evaluate(run.path, [*WANTED, f"evaluate.reference={file}"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ("[fd,kid,prc]", "kid and prc compare single images"),
        ("[spectrum]", "is not used without fd"),
    ],
)
def test_metrics_that_a_file_does_not_give_are_refused(make_run, metrics, words):
    with pytest.raises(ValueError, match=words):
        evaluate(make_run().path, [f"evaluate.metrics={metrics}", "evaluate.reference=a.npz"])
