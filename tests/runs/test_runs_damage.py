"""A damaged file of a run is named in one line, and resuming goes on from what is sound."""

import os
import shutil

import pytest
import torch
from damage import FEW, damage
from hypothesis import given
from stored import save

from flowdopr.config import ConfigError
from flowdopr.disk import read_tensors, write_tensors
from flowdopr.runs import RunFolder

CHECKPOINT = "checkpoints/step-00000004/"
READERS = {
    "config.yaml": lambda run: RunFolder.open(run.path).config,
    "dataset.json": lambda run: RunFolder.open(run.path).dataset,
    "versions.json": lambda run: run.made_by(),
    "metrics.jsonl": lambda run: run.metrics(),
    f"{CHECKPOINT}model.safetensors": lambda run: run.load_weights(4, "raw"),
    f"{CHECKPOINT}state.pt": lambda run: run.load_state(4)["losses"],
    f"{CHECKPOINT}checkpoint.json": lambda run: run.load_weights(4, "raw"),
    f"{CHECKPOINT}config.yaml": lambda run: run.chosen_step(),
}
FILES_OF_A_CHECKPOINT = [
    *("checkpoint.json", "config.yaml", "dataset.json", "ema-0.9999.safetensors"),
    *("metrics.jsonl", "model.safetensors", "state.pt", "versions.json"),
]


@pytest.fixture
def run(create):
    return save(create(), 2, 4)


def read(run, name):
    """What the reader of the file `name` returns, or its message, which is one line."""
    try:
        return READERS[name](run)
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    assert message.startswith(str(run.path / name))
    return message


@pytest.mark.parametrize("name", READERS)
@FEW
@given(change=damage())
def test_any_damage_is_named_in_one_line_or_harmless(run, name, change):
    path = run.path / name
    whole, expected = path.read_bytes(), READERS[name](run)
    path.write_bytes(change(whole))
    try:
        found = read(run, name)
    finally:
        path.write_bytes(whole)
    if name == "metrics.jsonl" and isinstance(found, list):  # the last line may be cut short
        assert found in (expected, expected[:-1])
    elif not isinstance(found, str):
        assert found == expected


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors"])
@FEW
@given(change=damage())
def test_damage_is_one_line_also_without_checksums(run, name, change):
    """The checkpoint is one of an earlier version."""
    (run.path / CHECKPOINT / "checkpoint.json").write_text('{"step": 4}')
    path = run.path / CHECKPOINT / name
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    try:
        read(run, CHECKPOINT + name)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", [b"\0\n", b"[]\n", b"{\n", b"[" * 100_000 + b"\n", None])
def test_what_no_reader_can_use_is_refused(run, name, content):
    path = run.path / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    elif name in ("config.yaml", "dataset.json"):
        return  # without these the folder is no run
    assert isinstance(read(run, name), str)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def take_from_another_checkpoint(path):
    shutil.copy(path.parent.parent / "step-00000002" / path.name, path)
    os.utime(path)


@pytest.mark.parametrize("harm", [flip, cut, os.unlink, take_from_another_checkpoint])
@pytest.mark.parametrize("name", FILES_OF_A_CHECKPOINT)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    run, create, caplog, name, harm
):
    folder = run.path / CHECKPOINT
    assert sorted(path.name for path in folder.iterdir()) == FILES_OF_A_CHECKPOINT
    same = {"config.yaml", "dataset.json", "versions.json"}
    if harm is take_from_another_checkpoint and name in same:
        return  # they have the same bytes in both
    harm(folder / name)
    with pytest.raises(ValueError, match=rf"^{folder / name}: is .*choose another by --step \(2\)"):
        run.check(4)
    assert create(resume=True).steps() == [2]
    assert [line["step"] for line in run.metrics()] == [2]
    assert (folder.parent / "step-00000004.damaged").is_dir()
    [line] = [record.message for record in caplog.records if "damaged" in record.message]
    assert line.startswith(f"{folder / name}: is ")
    assert line.endswith("the checkpoint is set aside, with the ending .damaged")


def test_a_checkpoint_of_another_run_or_step_is_not_used(run, create):
    other = save(create("name=other", "optimizer.lr=0.25"), 6)
    shutil.copytree(other.checkpoint_path(6), run.checkpoint_path(6))
    with pytest.raises(ValueError, match=r"6: is of another run: optimizer.lr was 0.25, now"):
        run.chosen_step()
    shutil.copytree(run.checkpoint_path(4), run.checkpoint_path(8))
    with pytest.raises(ValueError, match=r"8/checkpoint.json: is damaged: it belongs to step 4"):
        run.load_weights(8, "raw")
    assert create(resume=True).steps() == [2, 4]


def test_training_starts_anew_where_no_checkpoint_is_sound(run, create):
    for step in run.steps():
        cut(run.checkpoint_path(step) / "state.pt")
    again = create(resume=True)
    assert (again.steps(), again.metrics()) == ([], [])
    assert len(list((run.path / "checkpoints").glob("step-*.damaged"))) == 2


@pytest.mark.parametrize("harm", [flip, cut, os.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["config.yaml", "dataset.json", "versions.json", "metrics.jsonl"])
def test_a_resumed_run_restores_its_own_files(run, create, name, harm):
    create(resume=True)
    path = run.path / name
    before = path.read_bytes()
    harm(path)
    create(resume=True)
    assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="a run of another config is here: seed was 0, now 1"):
        create("seed=1", resume=True)


def test_a_checkpoint_of_an_earlier_version_is_used_and_named(run, create, caplog):
    for step in run.steps():
        folder = run.checkpoint_path(step)
        (folder / "checkpoint.json").write_text(f'{{"step": {step}, "images": 64}}')
        for name in ("config.yaml", "dataset.json", "versions.json", "metrics.jsonl"):
            (folder / name).unlink()
    before = run.metrics()
    assert run.chosen_step() == 4
    again = create(resume=True, commit="two")
    assert again.load_weights(4, "raw")["w"] == 4
    assert (again.steps(), again.metrics()) == ([2, 4], before)
    assert [launch["commit"] for launch in again.made_by()["earlier"]] == ["one"]
    said = f"{run.path / CHECKPOINT[:-1]}: of an earlier version, without checksums: "
    assert all(record.message.startswith(said) for record in caplog.records)


@pytest.mark.parametrize("name", ["log.txt", "evaluation", "metrics.jsonl", ".lock"])
def test_what_a_link_would_write_outside_the_run_is_refused(run, create, tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    shutil.rmtree(run.path / name, ignore_errors=True)
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(outside)
    with pytest.raises(ConfigError, match=rf"{name}: is a link, through which"):
        create(resume=True)
    assert outside.read_text() == "precious"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({}, "w is missing"),
        ({"w": torch.zeros(2), "v": torch.zeros(1)}, "v is not in the model"),
        ({"w": torch.zeros(3)}, r"w is \[3\] torch.float32, not \[2\] torch.float32"),
        ({"w": torch.zeros(2, dtype=torch.int32)}, r"w is \[2\] torch.int32, not"),
        ({name: torch.zeros(1) for name in "abcde"}, "a is not in the model, .* and 3 more"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, found, words):
    path = tmp_path / "weights.safetensors"
    write_tensors(path, found)
    with pytest.raises(ValueError, match=rf"^{path}: does not fit the model: {words}.*; go home$"):
        read_tensors(path, "go home", {"w": torch.zeros(2)})


def test_all_files_have_the_permissions_of_the_user(run):
    (run.path / "plain").touch()
    modes = {path.stat().st_mode for path in run.path.rglob("*") if path.is_file()}
    assert modes == {(run.path / "plain").stat().st_mode}


def test_what_a_killed_process_left_half_written_is_removed(run, create):
    (run.path / "samples" / "step-00000006.png.part").write_text("half")
    (run.path / "checkpoints" / "step-00000006.part").mkdir()
    create(resume=True)
    assert [path.name for path in run.path.rglob("*.part")] == []
