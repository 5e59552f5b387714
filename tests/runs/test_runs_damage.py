"""A damaged file of a run ends in one line that names it, whatever the damage."""

import pytest
import torch
from damage import FEW, damage
from hypothesis import given
from stored import save

from flowdopr.disk import read_tensors, write_tensors
from flowdopr.runs import RunFolder

CHECKPOINT = "checkpoints/step-00000004/"
READERS = {
    "config.yaml": lambda run: RunFolder.open(run.path),
    "dataset.json": lambda run: RunFolder.open(run.path),
    "versions.json": lambda run: run.made_by(),
    "metrics.jsonl": lambda run: run.metrics(),
    f"{CHECKPOINT}model.safetensors": lambda run: run.load_weights(4, "raw"),
    f"{CHECKPOINT}state.pt": lambda run: run.load_state(4),
}


@pytest.fixture
def run(create):
    return save(create(), 2, 4)


def check_one_line(run, name):
    """The reader of the file `name` succeeds, or says in one line what is wrong with it."""
    try:
        READERS[name](run)
    except ValueError as error:
        message = str(error)
    else:
        return ""
    assert "\n" not in message
    assert message.startswith(str(run.path / name))
    return message


@pytest.mark.parametrize("name", READERS)
@FEW
@given(change=damage())
def test_any_damage_is_named_in_one_line(run, name, change):
    path = run.path / name
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    try:
        check_one_line(run, name)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", [b"\0\n", b"[]\n", b"{\n", b"[" * 100_000 + b"\n", None])
def test_what_no_reader_can_use_is_refused(run, name, content):
    path = run.path / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    elif name in ("config.yaml", "dataset.json", "versions.json", "metrics.jsonl"):
        return  # without these the folder is no run, or a new one
    assert check_one_line(run, name)


def test_a_damaged_checkpoint_is_explained_with_the_remedy(run):
    (run.path / CHECKPOINT / "state.pt").write_bytes(b"")
    remedy = f"go on from an earlier checkpoint by deleting {run.path / CHECKPOINT}"
    assert remedy in check_one_line(run, f"{CHECKPOINT}state.pt")


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
