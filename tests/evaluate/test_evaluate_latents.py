"""Latents from end to end: encode, train, sample, evaluate; decoded by the recorded autoencoder."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from latent_run import notes_of, save_autoencoder, source_config, training_config
from PIL import Image

from flowdopr.cli import run_command
from flowdopr.config import ConfigError
from flowdopr.data import plain_batches, to_uint8
from flowdopr.disk import sealed, write_json
from flowdopr.evaluate import classifier, evaluate, sample
from flowdopr.flow import build_sampling, generate
from flowdopr.latents import Autoencoder, build_datasets, build_pixel_datasets, encode, load_decoder
from flowdopr.runs import RunFolder
from flowdopr.train import train


@pytest.fixture(autouse=True)
def _quick_classifier(monkeypatch):
    full = classifier.train_classifier
    monkeypatch.setattr(classifier, "train_classifier", lambda *args: full(*args, steps=3))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def pictures(write_images, tmp_path):
    return write_images(tmp_path / "pictures", {"cat": 8, "dog": 12}, size=20)


@pytest.fixture
def latents(tmp_path, vae, pictures):
    return encode(source_config(pictures), autoencoder=str(vae), out=tmp_path / "latents")


@pytest.fixture
def run(latents):
    return train(training_config(latents))


def test_shards_hold_the_autoencoders_posterior(tmp_path, vae, pictures):
    config = source_config(pictures, "data.horizontal_flip=true")
    out = encode(config, autoencoder=str(vae), out=tmp_path / "out", kept="mean", dtype="float32")
    latent = build_datasets(training_config(out))
    images, _ = next(plain_batches(build_datasets(config).train, 100))
    autoencoder = Autoencoder.from_pretrained(str(vae))
    stored, _ = next(plain_batches(latent.train, 100))
    torch.testing.assert_close(stored, autoencoder.encode(images), rtol=1e-4, atol=1e-5)
    mean, std = autoencoder.posterior(images)
    posterior = autoencoder.vae.encode(images).latent_dist
    torch.testing.assert_close(mean, autoencoder.encode(images))
    torch.testing.assert_close(std, posterior.std * autoencoder.scale)
    notes = notes_of(out)
    assert notes["mirrored"]
    assert notes["autoencoder"] == autoencoder.record(str(vae))
    assert latent.info.image_shape == (4, 8, 8)


def test_sample_grids_and_samples_are_decoded(run, tmp_path):
    assert pixels(run / "samples" / "step-00000004.png").shape == (2 * 34 + 2, 2 * 34 + 2, 3)
    out = sample(run, num=3, out=tmp_path / "out", seed=5)
    folder = RunFolder.open(run)
    model, _ = folder.load_model()
    plain = generate(model, torch.tensor([0, 1, 0]), seed=5, sampling=build_sampling(folder.config))
    expected = to_uint8(load_decoder(folder.dataset.autoencoder)(plain.images))
    for index in range(3):
        (path,) = out.glob(f"{index:06d}-*.png")
        found = pixels(path)
        assert np.abs(found - expected[index].permute(1, 2, 0).numpy()).max() <= 1
    card = json.loads((out / "sampling.json").read_text())
    assert card["autoencoder"] == folder.dataset.autoencoder


def test_the_reference_is_the_source_data_sets_own_images(run, latents):
    card = json.loads(evaluate(run).read_text())
    source = build_pixel_datasets(training_config(latents)).info
    assert card["reference"] == {
        "name": "folder train",
        "fingerprint": source.fingerprint,
        "num_images": 15,
    }
    assert (
        card["autoencoder"]["weights_sha256"] == notes_of(latents)["autoencoder"]["weights_sha256"]
    )
    assert np.isfinite(card["metrics"]["fd"])
    assert np.isfinite(card["metrics"]["one_step_loss"])


def test_training_on_latents_resumes_bitwise(latents, tmp_path):
    whole = train(training_config(latents, "name=whole"))
    train(training_config(latents, "name=parts", "train.steps=2"))
    parts = train(training_config(latents, "name=parts"), resume=True)
    one, other = (RunFolder.open(path).load_weights(4, "raw") for path in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_moved_folders_are_given_again(run, latents, vae, pictures, tmp_path):
    notes = notes_of(latents)
    gone = str(tmp_path / "gone")
    notes["autoencoder"]["name"] = gone
    (latents / "latents.json").write_text(json.dumps(notes))
    info = json.loads((run / "dataset.json").read_text())
    info["autoencoder"]["name"] = gone
    write_json(run / "dataset.json", sealed(info))
    pictures.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"no autoencoder could be loaded from {gone}"):
        sample(run, num=1, out=tmp_path / "none")
    sample(run, num=1, out=tmp_path / "out", autoencoder=str(vae))
    places = [f"data.source_root={tmp_path / 'moved'}", f"data.autoencoder={vae}"]
    assert json.loads(evaluate(run, places).read_text())["metrics"]["fd"] > 0


def test_another_autoencoder_is_refused(run, tmp_path):
    other = save_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="has other weights than the autoencoder that made"):
        sample(run, num=1, out=tmp_path / "out", autoencoder=str(other))
    assert not (tmp_path / "out").exists()


def test_training_asks_for_the_autoencoder_before_it_begins(latents, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r'pip install "flowdopr\[latents\]"'):
        train(training_config(latents))
    assert not (tmp_path / "runs").exists()


def test_the_commands(tmp_path, vae, pictures, capsys):
    source_config(pictures)
    out, settings = str(tmp_path / "out"), ["--autoencoder", str(vae)]
    command = ["encode", str(tmp_path / "source.yaml"), "--out", out, *settings]
    assert run_command([*command, "--kept", "mean"]) == 0
    assert capsys.readouterr().out.strip() == out
    for extra, message in (
        ([], "give --out a new folder"),
        (["--kept", "some", "--out", f"{out}2"], "'some' is not one of 'posterior', 'mean'"),
        (["data.image_size=17", "--out", f"{out}2"], "multiples of 2, not images of 3 x 17 x 17"),
        (
            ["data.name=latents", "data.image_size=null", "data.held_out_fraction=0.1"],
            "data.name=latents is encoded already",
        ),
    ):
        assert run_command([*command, *extra]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1


def test_a_source_of_two_folders_may_move(tmp_path, vae, pictures, write_images):
    test = write_images(tmp_path / "test", {"cat": 2, "dog": 1}, size=20)
    config = source_config(pictures, f"data.held_out_root={test}", "data.held_out_fraction=0.1")
    out = encode(config, autoencoder=str(vae), out=tmp_path / "out")
    run = train(training_config(out, "evaluate.metrics=[]"))
    assert RunFolder.open(run).dataset.num_held_out == 3
    test.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"data.held_out_root: there is no folder"):
        evaluate(run)
    assert evaluate(run, [f"data.held_out_root={tmp_path / 'moved'}"]).is_file()


MAKE = """
import torch

def make():
    return [(torch.eye(16).byte().repeat(2, 1, 1, 1), [0, 1])] * 2
"""


def test_the_pixels_of_images_without_a_folder_are_found_again_if_allowed(
    tmp_path, vae, pictures, own_module, monkeypatch
):
    own_module("pictures_of_mine", MAKE)
    monkeypatch.setenv("FLOWDOPR_CODE", "pictures_of_mine:make")
    for name in ("digits, image_size: 16", "own, factory: 'pictures_of_mine:make'"):
        config = source_config(pictures, f"data={{name: {name}, channels: 3}}")
        out = encode(config, autoencoder=str(vae), out=tmp_path / config.data.name)
        assert build_pixel_datasets(training_config(out)).info == build_datasets(config).info
    monkeypatch.delenv("FLOWDOPR_CODE")
    with pytest.raises(ConfigError, match=r"latents.json: data.factory: pictures_of_mine:make is"):
        build_pixel_datasets(training_config(out))


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path, vae, pictures):
    alone = encode(
        source_config(pictures), autoencoder=str(vae), out=tmp_path / "alone", shard_size=4
    )
    command = ["encode", str(tmp_path / "source.yaml"), "--autoencoder", str(vae)]
    both = tmp_path / "both"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [sys.executable, *launcher, "-m", "flowdopr", *command, "--out", both, "--shard-size", "4"],
        check=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        timeout=120,
    )
    assert notes_of(both) == notes_of(alone)
