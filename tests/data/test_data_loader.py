"""Batches are a pure function of (seed, step), whoever asks and from wherever."""

from itertools import islice

import pytest
import torch

from flowdopr.data import build_loader, from_uint8, plain_batches
from flowdopr.data.loader import epoch_picks, picks_between
from flowdopr.data.memory import free_memory
from flowdopr.data.sources import Folder
from flowdopr.latents import build_datasets


@pytest.fixture
def digits(make_config):
    return build_datasets(make_config(name="digits")).train


def take(config, dataset, count, **where):
    """Steps as (x_1, y)."""
    return [batch.on("cpu") for batch in islice(build_loader(config, dataset, **where), count)]


def assert_same(left, right):
    for (x_left, y_left), (x_right, y_right) in zip(left, right, strict=True):
        assert torch.equal(x_left, x_right)
        assert torch.equal(y_left, y_right)


def test_images_are_uint8_until_the_device(make_config, write_images, tmp_path, digits):
    write_images(tmp_path, {"": 9})
    files = build_datasets(make_config(name="folder", root=str(tmp_path))).train
    for dataset, workers in ((digits, 0), (files, 0), (files, 1)):
        config = make_config(
            name="folder", root=str(tmp_path), num_workers=workers, horizontal_flip=True
        )
        batch = next(build_loader(config, dataset))
        assert batch.images.dtype == torch.uint8
        assert batch.mirrored.any()
        halves = [batch.part(slice(first, first + 4)).on("cpu") for first in (0, 4)]
        joined = [torch.cat(column) for column in zip(*halves, strict=True)]
        assert_same([joined], [batch.on("cpu")])


def test_a_cache_decodes_each_image_once(make_config, write_images, tmp_path, monkeypatch):
    """The batches are those without it, and no file is read after the first of them."""
    write_images(tmp_path, {"a": 6, "b": 7})
    settings = {"name": "folder", "root": str(tmp_path), "horizontal_flip": True, "batch": 4}
    train = build_datasets(make_config(**settings)).train
    expected = take(make_config(**settings), train, 9)
    for workers in (0, 1):
        config = make_config(**settings, cache="memory", num_workers=workers)
        loader = build_loader(config, train)
        with monkeypatch.context() as patched:
            patched.setattr(Folder, "_bytes", None)  # would fail if a file was read
            assert_same([batch.on("cpu") for batch in islice(loader, 9)], expected)
    monkeypatch.setattr("flowdopr.data.loader.free_memory", lambda: 11 * 3 * 8 * 8 - 1)
    with pytest.raises(
        ValueError, match=r"^data.cache=memory: 11 images of 3 x 8 x 8 take .* free"
    ):
        build_loader(make_config(**settings, cache="memory"), train)
    assert free_memory() > 2**20


def test_a_batch_has_the_contract_shape_and_range(make_config, digits):
    ((x_1, y),) = take(make_config(name="digits", batch=64), digits, 1)
    assert x_1.shape == (64, 1, 8, 8)
    assert x_1.dtype == torch.float32
    assert (y.shape, y.dtype) == ((64,), torch.int64)
    assert x_1.min() == -1
    assert x_1.max() == 1


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(make_config, digits):
    first, again, other = (
        take(make_config(name="digits", seed=seed), digits, 3) for seed in (0, 0, 1)
    )
    assert_same(first, again)
    assert not torch.equal(first[0][0], other[0][0])


@pytest.mark.parametrize("start", [0, 1, 5, 201, 202, 1000])
def test_any_step_can_be_the_first(make_config, digits, start):
    config = make_config(name="digits", batch=8, horizontal_flip=True)
    whole = take(config, digits, start + 3)
    assert_same(whole[start:], take(config, digits, 3, start_step=start))


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_out_the_one_global_batch(make_config, digits, world_size):
    config = make_config(name="digits", batch=8, horizontal_flip=True)
    alone = take(config, digits, 3)
    shares = [
        take(config, digits, 3, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    joined = [
        tuple(torch.cat(part) for part in zip(*step, strict=True))
        for step in zip(*shares, strict=True)
    ]
    assert_same(alone, joined)


def test_a_batch_that_does_not_divide_is_refused(make_config, digits):
    with pytest.raises(ValueError, match=r"global_batch_size 8 is not a multiple .* 3$"):
        build_loader(make_config(name="digits", batch=8), digits, world_size=3)


@pytest.mark.parametrize("batch", [3, 10, 25])
def test_every_epoch_shows_every_image_once(batch):
    epochs = 4
    steps = [picks_between(0, 10, s, s + batch).indices for s in range(0, 10 * epochs, batch)]
    line = torch.cat(steps)[: 10 * epochs].view(epochs, 10)
    assert torch.equal(line.sort(dim=1).values, torch.arange(10).expand(epochs, 10))
    assert len({tuple(order.tolist()) for order in line}) == epochs


def test_half_of_the_images_are_mirrored_by_image_and_epoch_alone(make_config, digits):
    config = make_config(name="digits", batch=len(digits), horizontal_flip=True)
    for epoch, (x_1, y) in enumerate(take(config, digits, 2)):
        picks = epoch_picks(0, epoch, len(digits))
        assert torch.equal(y, digits.labels[picks.indices])
        assert abs(picks.mirrored.float().mean() - 0.5) < 0.05
        for place in range(40):
            plain = from_uint8(digits[int(picks.indices[place])][0])
            expected = plain.flip(-1) if picks.mirrored[place] else plain
            assert torch.equal(x_1[place], expected)


def test_workers_give_what_the_process_itself_gives(make_config, write_images, tmp_path):
    write_images(tmp_path, {"a": 6, "b": 7})
    alone, helped = (
        make_config(
            name="folder", root=str(tmp_path), batch=4, num_workers=workers, horizontal_flip=True
        )
        for workers in (0, 2)
    )
    train = build_datasets(alone).train
    assert_same(take(alone, train, 6, start_step=2), take(helped, train, 6, start_step=2))


def test_plain_batches_show_every_image_once_in_order(digits):
    batches = list(plain_batches(digits, 1000))
    assert [len(y) for _, y in batches] == [1000, 618]
    assert torch.equal(torch.cat([x_1 for x_1, _ in batches]), from_uint8(digits.images))


def test_the_loader_leaves_the_global_random_state_alone(make_config, digits):
    before = torch.get_rng_state()
    take(make_config(name="digits"), digits, 2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_one_line_from_a_worker_too(make_config, write_images, tmp_path, workers):
    write_images(tmp_path, {"": 6})
    for path in sorted(tmp_path.iterdir())[1:]:
        path.write_bytes(b"not an image")
    config = make_config(name="folder", root=str(tmp_path), num_workers=workers)
    with pytest.raises(ValueError, match=r"cannot read the image '.*\.png'") as caught:
        take(config, build_datasets(config).train, 2)
    assert "\n" not in str(caught.value)
