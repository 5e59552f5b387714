"""What fails does not take the trained steps with it, and is said in one line."""

import json
import multiprocessing
import os
import re
import resource
import signal
import threading
import time

import breaking
import numpy as np
import poison
import pytest
import torch
from breaking import break_after_check
from tiny import again, assert_same_checkpoint, start_two, tiny, tiny_file, without_times

from flowdopr.cli import run_command
from flowdopr.config import ConfigError
from flowdopr.data.loader import epoch_picks
from flowdopr.exits import is_out_of_memory
from flowdopr.runs import RunFolder
from flowdopr.train import TrainingFailed, start, train

STIFF = ("sample.solver=dopri5", "sample.guidance.scale=1e30")  # dopri5's steps underflow


@pytest.fixture
def images(write_images, tmp_path):
    """Settings for 40 images and 5 held-out ones in folders of their own."""
    roots = {key: tmp_path / key for key in ("root", "held_out_root")}
    for root, count in zip(roots.values(), (40, 5), strict=True):
        write_images(root, {"one": count, "two": count})
    return ["data.name=folder", *(f"data.{key}={root}" for key, root in roots.items())]


def training_image(config, position):
    """The path of the training image at `position` of the first epoch."""
    number = int(epoch_picks(config.seed, 0, 80)[0][position])
    folder = ("one", "two")[number // 40]
    return f"{config.data.root}/{folder}/{sorted(map(str, range(40)))[number % 40]}.png"


@pytest.fixture
def breaks(monkeypatch):
    """`breaks(image)`: see `break_after_check`."""
    monkeypatch.setattr(start, "check_start", start.check_start)  # restored after the test
    return break_after_check


def test_a_sample_grid_that_fails_costs_only_itself(tmp_path, capfd):
    path, shared = tiny_file(tmp_path, "train.sample_every=4", "train.checkpoint_every=4")
    assert run_command(["train", str(path), *shared, *STIFF]) == 0
    out, err = capfd.readouterr()
    run = RunFolder.open(out.strip())
    assert run.steps() == [4, 8]
    assert "no sample grid of step 4: solver='dopri5' failed (underflow" in err
    assert err.strip().endswith("trained, but without sample grid of step 4, sample grid of step 8")
    assert "Traceback" not in err
    assert "Traceback" in (run.path / "log.txt").read_text()
    plain = train(tiny(tmp_path, "name=plain", "sample.guidance.scale=2"))
    assert_same_checkpoint(run.path, plain, 8)
    assert run_command(["train", str(path), *shared, "--resume"]) == 0
    assert [grid.name for grid in (run.path / "samples").iterdir()] == ["step-00000008.png"]


def test_a_broken_held_out_image_costs_only_the_held_out_loss(tmp_path, images, breaks, capfd):
    config = tiny(tmp_path, *images)
    breaks(f"{config.data.held_out_root}/two/1.png")
    run = RunFolder.open(train(config))
    assert run.steps() == [8]
    assert "two/1.png" in capfd.readouterr().err
    assert "held_out_loss" not in run.metrics()[-1]
    assert (run.path / "samples" / "step-00000008.png").exists()


@pytest.mark.parametrize(
    ("position", "words"), [(2 * 16, "step 2 is saved: mend it, and"), (0, "nothing was trained")]
)
def test_images_that_cannot_be_loaded_end_the_run_after_saving(
    tmp_path, images, breaks, position, words
):
    config = tiny(tmp_path, *images)
    straight = train(again(config, "name=straight", "train.steps=2"))
    broken = training_image(config, position)
    breaks(broken)
    with pytest.raises(TrainingFailed, match=rf"'{broken}' .*; {words}"):
        train(config)
    if position:
        assert_same_checkpoint(straight, tmp_path / "runs" / "tiny", 2)
    else:
        assert RunFolder.open(tmp_path / "runs" / "tiny").steps() == []


@pytest.mark.slow
def test_each_process_says_its_own_error(tmp_path, images):
    path, shared = tiny_file(tmp_path, *images)
    broken = training_image(tiny(tmp_path, *images), 2 * 16 + 8)  # in the share of process 1
    processes = start_two(breaking.__file__, broken, "train", str(path), *shared)
    said = [process.communicate(timeout=200)[1].strip().split("\n") for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "flowdopr: process 0: " in said[0][-1]
    assert "process 1 failed; step 2 is saved: mend it, and go on with" in said[0][-1]
    assert said[1][-1].startswith("flowdopr: process 1: ")
    assert broken in said[1][-1]
    assert not any("Traceback" in line for lines in said for line in lines)
    assert RunFolder.open(tmp_path / "runs" / "tiny").steps() == [2]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("killed", [0, 1])
def test_the_end_of_a_process_ends_the_other_in_one_line(tmp_path, killed, signum):
    """Within a minute if it dies, and within train.process_timeout if it hangs."""
    settings = ["train.checkpoint_every=5", "train.steps=1000000", "train.process_timeout=10"]
    path, shared = tiny_file(tmp_path, *settings)
    processes = start_two("-m", "flowdopr", "train", str(path), *shared)
    while not list(tmp_path.glob("runs/tiny/checkpoints/step-????????")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[killed].send_signal(signum)
    said = processes[1 - killed].communicate(timeout=60)[1]
    assert processes[1 - killed].returncode == 1
    line = said.strip().split("\n")[-1]
    assert line.startswith(f"flowdopr: process {1 - killed}: stopped, because another process")
    assert "Traceback" not in said
    processes[killed].kill()
    processes[killed].communicate()


@pytest.mark.slow
def test_an_error_within_a_step_of_one_process_ends_the_other(tmp_path):
    path, shared = tiny_file(tmp_path)
    spoiling = json.dumps({"kind": "error", "steps": [3], "rank": 1})
    processes = start_two(poison.__file__, spoiling, "train", str(path), *shared)
    processes[1].wait(timeout=200)
    said = [process.communicate(timeout=60)[1].strip() for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert said[0].split("\n")[-1].startswith("flowdopr: process 0: stopped, because another")
    assert said[1].endswith("RuntimeError: a layer failed")


def test_a_killed_worker_ends_the_run_in_one_line_and_it_goes_on_bitwise(tmp_path, images):
    settings = [*images, "data.num_workers=1", "train.steps=400", "train.checkpoint_every=2"]
    settings += ["train.keep_checkpoints=2"]
    config = tiny(tmp_path, *settings)
    path = tmp_path / "runs" / "tiny"

    def kill_a_worker() -> None:
        while not (path / "checkpoints" / "step-00000004").exists():
            time.sleep(0.01)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_a_worker, daemon=True)
    killer.start()
    # torch notices it while the run waits for images, or anywhere within a step.
    with pytest.raises(TrainingFailed, match=r"DataLoader worker .*--resume") as caught:
        train(config)
    assert str(caught.value).count("--resume") == 1
    killer.join()
    reached = max(RunFolder.open(path).steps())
    train(again(config, f"train.steps={reached + 3}", "train.checkpoint_every=3"), resume=True)
    straight = tiny(tmp_path, *settings, "name=straight", f"train.steps={reached + 3}")
    assert_same_checkpoint(train(straight), path, reached + 3)


@pytest.mark.slow
def test_an_error_of_all_processes_is_said_once(tmp_path):
    path, shared = tiny_file(tmp_path, "data.name=folder", "data.root=nowhere")
    said = [
        process.communicate(timeout=200)[1]
        for process in start_two("-m", "flowdopr", "train", str(path), *shared)
    ]
    assert sum(text.count("there is no folder 'nowhere'") for text in said) == 1
    assert all("Traceback" not in text for text in said)


@pytest.mark.parametrize("ask", [lambda: torch.empty(10**15), lambda: np.empty(10**15)])
def test_too_little_memory_is_recognised(ask):
    with pytest.raises((RuntimeError, MemoryError)) as error:
        ask()
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_too_little_memory_names_the_settings_to_lower(tmp_path, capfd):
    path, shared = tiny_file(tmp_path, "model.hidden_size=1000000000000")
    assert run_command(["train", str(path), *shared]) == 1
    said = capfd.readouterr().err
    assert said.startswith("flowdopr: train: out of memory; raise train.accumulation_steps")
    assert said.count("\n") == 1


@pytest.fixture
def no_large_files():
    """Files cannot grow beyond 30,000 bytes: the checkpoints of the tiny run are larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(
    tmp_path, no_large_files, capfd
):
    path, shared = tiny_file(tmp_path, "name=full", "train.checkpoint_every=4")
    run = train(tiny(tmp_path, "name=full", "train.steps=2"))
    no_large_files()
    capfd.readouterr()
    assert run_command(["train", str(path), *shared, "--resume"]) == 1
    said = capfd.readouterr().err
    why = r"/checkpoints/step-0000000\d: cannot be written: .*File too large.*"
    assert re.search(rf"step 4 is not saved: {run}{why}; the next checkpoint tries again", said)
    line = said.strip().split("\n")[-1]
    assert re.match(
        rf"flowdopr: {run}: trained to step 8, which could not be saved: {run}{why}", line
    )
    assert "the newest checkpoint is of step 2: mend it, and go on with" in line
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000002"]


def test_metrics_and_a_log_that_cannot_be_written_do_not_end_the_run(
    tmp_path, no_large_files, capfd
):
    """What metrics.jsonl misses is in the checkpoint, and comes back from there."""
    small = ["model.hidden_size=4", "model.num_heads=1", "optimizer={name: sgd, lr: 0.1}"]
    config = tiny(tmp_path, *small, "train.log_every=1")
    run = train(again(config, "train.steps=2"))
    long = run / "log.txt"
    long.write_text("-" * 40_000)
    no_large_files()
    capfd.readouterr()
    train(config, resume=True)
    assert capfd.readouterr().err.count(f"{long}: cannot be written: File too large; train") == 1
    assert RunFolder.open(run).steps() == [2, 8]


@pytest.mark.parametrize("returns", [True, False])
def test_training_goes_on_without_its_folder(tmp_path, capfd, returns):
    """The folder is moved away, and a file takes its place, as where a disk has gone."""
    settings = ["train.checkpoint_every=5", "train.steps=60", "train.log_every=1"]
    straight = train(tiny(tmp_path, *settings, "name=straight"))
    run, away = straight.with_name("gone"), tmp_path / "away"
    path, shared = tiny_file(tmp_path, *settings, "name=gone")
    capfd.readouterr()

    def move_away() -> None:
        while not list(run.glob("checkpoints/step-????????")):
            time.sleep(0.001)
        run.rename(away)
        run.write_text("no folder")

    def move_back() -> None:
        log = away / "log.txt"
        while not (log.exists() and "is not saved" in log.read_text()):
            time.sleep(0.001)
        run.unlink()
        away.rename(run)

    workers = [threading.Thread(target=work) for work in (move_away, move_back)[: 1 + returns]]
    for worker in workers:
        worker.start()
    code = run_command(["train", str(path), *shared])
    for worker in workers:
        worker.join()
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert re.search(rf"step \d+ is not saved: {run}/checkpoints/step-.*: cannot be written", said)
    if not returns:
        assert code == 1
        assert "trained to step 60, which could not be saved" in said.strip().split("\n")[-1]
        run.unlink()
        away.rename(run)
    assert run_command(["train", str(path), *shared, "--resume"]) == 0
    assert_same_checkpoint(straight, run, 60)
    assert without_times(run) == without_times(straight)


def test_half_precision_needs_a_gpu(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.precision=fp16: .*; use bf16 or no"):
        train(tiny(tmp_path, "train.precision=fp16"))


def test_the_environment_of_accelerate_changes_nothing(tmp_path, monkeypatch):
    plain = train(tiny(tmp_path, "name=plain", "train.steps=3"))
    for name, value in {
        "MIXED_PRECISION": "bf16",
        "GRADIENT_ACCUMULATION_STEPS": "4",
        "DYNAMO_BACKEND": "inductor",
    }.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert_same_checkpoint(plain, train(tiny(tmp_path, "name=other", "train.steps=3")), 3)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_an_environment_that_asks_for_more_than_ddp_and_fsdp2_is_refused(
    tmp_path, monkeypatch, kind
):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(ValueError, match=rf"^ACCELERATE_USE_{kind}=true: .*; unset it, or"):
        train(tiny(tmp_path))


def test_the_older_fsdp_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"^FSDP_VERSION=1: .*; set fsdp_version: 2"):
        train(tiny(tmp_path))
