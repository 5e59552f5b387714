"""Latents on disk: what is written is what training sees, drawn anew each epoch, whole or refused.

The encoder here is two lines of arithmetic, so that every number is known.
"""

import json
import pickle
from itertools import islice

import pytest
import torch
from damage import FEW, damage, read_or_refused
from hypothesis import given
from safetensors.torch import load_file, save_file

from flowdopr.cli import run_command
from flowdopr.data import build_loader, plain_batches
from flowdopr.data.loader import epoch_picks
from flowdopr.disk import parse_json, to_json
from flowdopr.latents import build_datasets, build_pixel_datasets
from flowdopr.latents.shards import Encoding, write_notes, write_shards

RECORD = {"name": "arithmetic", "weights_sha256": "0" * 64, "scale": 1.0, "shift": 0.0}
SHAPE = (4, 4, 4)


def encoder(x):
    """Means and deviations that tell images, and an image from its mirror image."""
    mean = torch.nn.functional.avg_pool2d(x, 2)
    mean = torch.cat([mean, mean[:, :1] * 2], 1)
    return mean, mean.abs() + 0.5


@pytest.fixture
def source(make_config, write_images, tmp_path):
    folder = write_images(tmp_path / "images", {"cat": 7, "dog": 5})
    return make_config(name="folder", root=str(folder), held_out_fraction=0.25)


@pytest.fixture
def encode(source, tmp_path):
    """`encode(kept=..., ...)` -> the folder of latents."""

    def run(out="latents", *, make=encoder, config=source, notes=True, **settings):
        datasets, out = build_datasets(config), tmp_path / out
        data = config.data.model_dump(exclude={"autoencoder", "source_root"})
        chosen = {"shard_size": 3, "batch_size": 2, "dtype": "float32"} | settings
        encoding = Encoding(data, RECORD, SHAPE, **chosen)
        write_shards(out, datasets, make, encoding)
        if notes:
            write_notes(out, datasets, encoding, {"torch": "2"})
        return out

    return run


@pytest.fixture
def latents(make_config):
    """`latents(folder, ...)` -> the config that trains on it."""

    def make(folder, **settings):
        return make_config(name="latents", root=str(folder), **settings)

    return make


def test_the_data_set_is_known_by_its_source(encode, latents, source):
    data, pixels = build_datasets(latents(encode())), build_datasets(source)
    assert data.info.name == "latents of folder"
    assert data.info.image_shape == SHAPE
    assert data.info.class_names == ("cat", "dog")
    assert (data.info.num_train, data.info.num_held_out) == (9, 3)
    assert data.info.autoencoder == RECORD
    assert torch.equal(data.train.labels, pixels.train.labels)
    assert torch.equal(data.held_out.labels, pixels.held_out.labels)
    assert parse_json(type(data.info), to_json(data.info.to_dict())) == data.info


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_means_are_those_of_the_encoder(encode, latents, source, dtype):
    data = build_datasets(latents(encode(kept="mean", dtype=dtype)))
    for latent, pixels in zip(
        (data.train, data.held_out),
        (build_datasets(source).train, build_datasets(source).held_out),
        strict=True,
    ):
        (x, _), (images, _) = next(plain_batches(latent, 100)), next(plain_batches(pixels, 100))
        assert x.dtype == torch.float32
        expected, _ = encoder(images)
        torch.testing.assert_close(x, expected, rtol=0, atol=2e-3 if dtype == "float16" else 0)


def test_latents_are_drawn_from_the_posterior_anew_each_epoch(encode, latents, source):
    config = latents(encode(), batch=9)
    train = build_datasets(config).train
    mean, std = encoder(next(plain_batches(build_datasets(source).train, 100))[0])
    standard = []
    for epoch, (x, y, _) in enumerate(islice(build_loader(config, train), 400)):
        order = epoch_picks(0, epoch, 9).indices
        assert torch.equal(y, train.labels[order])
        standard.append((x - mean[order]) / std[order])
    noise = torch.stack(standard)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert not torch.equal(noise[0].sort().values, noise[1].sort().values)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_step_and_any_process_draws_the_same(encode, latents, workers):
    folder = encode(mirrored=True)
    config = latents(folder, batch=4, horizontal_flip=True, num_workers=workers)
    alone = latents(folder, batch=4, horizontal_flip=True)
    whole = list(islice(build_loader(alone, build_datasets(alone).train), 7))
    for rank in (0, 1):
        loader = build_loader(
            config, build_datasets(config).train, rank=rank, world_size=2, start_step=3
        )
        for (x, y, _), (x_all, y_all, _) in zip(islice(loader, 4), whole[3:], strict=True):
            part = slice(2 * rank, 2 * rank + 2)
            assert torch.equal(x, x_all[part])
            assert torch.equal(y, y_all[part])


def test_mirrored_copies_are_the_latents_of_mirrored_images(encode, latents, source):
    config = latents(encode(kept="mean", mirrored=True), batch=9, horizontal_flip=True)
    pixels = next(plain_batches(build_datasets(source).train, 100))[0]
    ((x, _, _),) = islice(build_loader(config, build_datasets(config).train), 1)
    picks = epoch_picks(0, 0, 9)
    assert 0 < picks.mirrored.sum() < 9
    for row, index, mirrored in zip(x, picks.indices, picks.mirrored, strict=True):
        image = pixels[index].flip(-1) if mirrored else pixels[index]
        assert torch.equal(row, encoder(image[None])[0][0])


def test_evaluation_sees_one_fixed_draw(encode, latents):
    data = build_datasets(latents(encode()))
    first = torch.cat([x for x, _ in plain_batches(data.held_out, 2)])
    again = torch.cat([x for x, _ in plain_batches(pickle.loads(pickle.dumps(data.held_out)), 3)])
    assert torch.equal(first, again)
    assert torch.equal(data.held_out[1][0], first[1])


def test_a_cut_encoding_goes_on_and_ends_up_the_same(encode, latents):
    calls = []

    def counting(x):
        calls.append(len(x))
        return encoder(x)

    def failing(x):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return counting(x)

    whole = build_datasets(latents(encode("whole"))).info.fingerprint
    with pytest.raises(KeyboardInterrupt):
        encode("cut", make=failing)
    folder = encode("cut", make=counting)
    assert sum(calls) == 3 + 2 + 9  # the second shard is begun again, the first is not
    assert build_datasets(latents(folder)).info.fingerprint == whole
    assert not list(folder.glob("*.part"))
    calls.clear()
    assert encode("cut", make=counting) == folder
    assert calls == []


def test_a_shard_says_what_it_holds(encode):
    shard = load_file(encode(mirrored=True, dtype="float16") / "train-00000003.safetensors")
    assert {name: value.dtype for name, value in shard.items()} == {
        **dict.fromkeys(("mean", "std", "mirrored_mean", "mirrored_std"), torch.float16),
        "labels": torch.int64,
    }


@pytest.mark.parametrize(
    "change", [{"kept": "mean"}, {"dtype": "float16"}, {"mirrored": True}, {"shard_size": 4}]
)
def test_another_encoding_does_not_mix_with_what_is_there(encode, change):
    encode()
    with pytest.raises(ValueError, match=r"holds latents of other .*; give --out a new folder$"):
        encode(**change)


def test_fingerprints_follow_content_and_not_place(encode, latents, tmp_path):
    first = encode("a", kept="mean")
    encode("b", kept="mean").rename(tmp_path / "elsewhere")
    other = encode("c", kept="mean", make=lambda x: (encoder(x)[0] + 1, encoder(x)[1]))
    folders = (first, tmp_path / "elsewhere", other, encode("d"))
    found = [build_datasets(latents(folder)).info.fingerprint for folder in folders]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_the_pixels_are_found_again_and_checked(encode, latents, source, write_images, tmp_path):
    folder = encode()
    pixels = build_pixel_datasets(latents(folder))
    assert pixels.info == build_datasets(source).info
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = build_pixel_datasets(latents(folder, source_root=str(tmp_path / "moved")))
    assert moved.info == pixels.info
    others = write_images(tmp_path / "others", {"cat": 6, "dog": 6})
    with pytest.raises(ValueError, match=r"^data.source_root: the images in '.*' are not those"):
        build_pixel_datasets(latents(folder, source_root=str(others)))


def test_no_latents_cut_latents_and_damaged_shards_are_one_line(encode, latents, tmp_path):
    cases = {
        r"has no latents.json; write it by: flowdopr encode CONFIG --autoencoder": tmp_path,
        r"has no latents.json; encoding was cut: the same command": encode("cut", notes=False),
    }
    folder = encode("short")
    shard = folder / "train-00000003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    cases[r"the shard '.*train-00000003.*' cannot be used \(\d+ of \d+ bytes\)"] = folder
    missing = encode("missing")
    (missing / "held_out-00000000.safetensors").unlink()
    cases[r"cannot be used \(it is missing\)"] = missing
    garbage = encode("garbage")
    shard = garbage / "train-00000000.safetensors"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    cases[r"cannot be used \(.*header"] = garbage
    for message, place in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            build_datasets(latents(place))
        assert "\n" not in str(caught.value)
    encode("short")
    assert build_datasets(latents(folder)).info.num_train == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": None}, "its tensors are not those that latents.json tells"),
        ({"mirrored_mean": torch.zeros(3, *SHAPE)}, "its tensors are not"),
        ({"mean": torch.zeros(3, 4, 4, 2)}, "its tensors are not"),
        ({"mean": torch.zeros(3, *SHAPE).half()}, "its tensors are not"),
        ({"labels": torch.zeros(3)}, "its tensors are not"),
        ({"labels": torch.tensor([0, 1, 2])}, "its labels are not those of the classes"),
    ],
)
def test_a_shard_of_another_form_is_one_line(encode, latents, change, message, capsys):
    folder = encode()
    path, notes = folder / "train-00000003.safetensors", folder / "latents.json"
    tensors = {k: v for k, v in (load_file(path) | change).items() if v is not None}
    save_file(tensors, path)
    values = json.loads(notes.read_text())
    values["shards"]["train"][1]["bytes"] = path.stat().st_size
    notes.write_text(json.dumps(values))
    config = folder / "c.yaml"
    config.write_text(f"data: {{name: latents, root: {folder}}}\n")
    with pytest.raises(ValueError, match=rf"the shard '{path}' cannot be used \({message}"):
        build_datasets(latents(folder))
    assert run_command(["check", str(config)]) == 1
    assert capsys.readouterr().out == f"{path}: not as it was written\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda notes: [], "object"),
        (lambda notes: notes | {"shards": {"train": []}}, "shards.train: .* at least 1"),
        (lambda notes: notes | {"kept": "all"}, "kept: "),
        (lambda notes: notes | {"source": {"data": {}, "info": []}}, "source.info"),
    ],
)
def test_notes_of_another_form_are_one_line(encode, latents, change, message):
    notes = encode() / "latents.json"
    notes.write_text(json.dumps(change(json.loads(notes.read_text()))))
    with pytest.raises(ValueError, match=rf"^data.root: '{notes}' is damaged \(.*{message}") as e:
        build_datasets(latents(notes.parent))
    assert str(e.value).isprintable()


@pytest.mark.parametrize("file", ["latents.json", "train-00000000.safetensors"])
@FEW
@given(damaged=damage())
def test_damaged_latents_are_read_or_refused(file, damaged, encode, latents):
    path = encode() / file
    whole = path.read_bytes()
    path.write_bytes(damaged(whole))
    read_or_refused(lambda: next(plain_batches(build_datasets(latents(path.parent)).train, 9)))
    read_or_refused(lambda: build_pixel_datasets(latents(path.parent)))
    path.write_bytes(whole)  # so that the next example need not encode again


def test_flips_need_mirrored_copies(encode, latents):
    with pytest.raises(ValueError, match="holds no mirrored copies; set it false, or encode again"):
        build_datasets(latents(encode(), horizontal_flip=True))


def test_numbers_beyond_the_dtype_are_refused(encode):
    with pytest.raises(ValueError, match="mean of train images exceeds float16; use --dtype"):
        encode(dtype="float16", make=lambda x: (encoder(x)[0] * 1e6, encoder(x)[1]))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("latents", {"image_size": 16}, "data.image_size=16 is not used by data.name=l"),
        ("digits", {"source_root": "x"}, "data.source_root=x is not used by data.name=d"),
    ],
)
def test_settings_of_the_other_kind_are_refused(make_config, name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(name=name, **settings)


def test_notes_are_readable_by_eye(encode):
    notes = json.loads((encode() / "latents.json").read_text())
    assert (notes["format"], notes["kept"], notes["dtype"]) == (1, "posterior", "float32")
    assert [shard["images"] for shard in notes["shards"]["train"]] == [3, 3, 3]
    assert notes["source"]["data"]["name"] == "folder"
