"""Checkpoints written beside training are those that would be written in its place."""

import threading
import time
from pathlib import Path

import pytest
import torch
from tiny import again, tiny

from flowdopr.runs import RunFolder
from flowdopr.train import train
from flowdopr.train.saving import Saver

FREE = "{name: outside, class_path: schedulefree.AdamWScheduleFree, lr: 0.01}"


def contents(run: Path, step: int) -> dict[str, bytes]:
    """The bytes of a checkpoint's tensors."""
    folder = RunFolder.open(run).checkpoint_path(step)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in KINDS}


KINDS = {".safetensors", ".pt"}


@pytest.fixture
def in_its_place(monkeypatch):
    """`in_its_place()`: from then on, training waits while its own tensors are written."""

    def save(self, step, **parts):
        self._write(step, parts)

    return lambda: monkeypatch.setattr(Saver, "save", save)


@pytest.mark.parametrize(
    "optimizer", ["{name: dopr-muon, lr: 0.01}", "{name: soap, lr: 0.01}", FREE]
)
def test_the_files_are_those_of_training_that_waits(tmp_path, in_its_place, optimizer):
    averages = "train.ema_decays=[]" if optimizer == FREE else "train.ema_lengths=[0.1]"
    config = tiny(tmp_path, f"optimizer={optimizer}", averages, "train.checkpoint_every=1")
    beside = train(again(config, "name=beside"))
    in_its_place()
    waiting = train(again(config, "name=waiting"))
    for step in range(1, 9):
        assert contents(beside, step) == contents(waiting, step)


class SlowRun:
    """Stands for a run whose disk is slow: a checkpoint is written when `go_on` is set."""

    def __init__(self):
        self.go_on, self.written = threading.Event(), []

    def save_checkpoint(self, step, **parts):
        assert self.go_on.wait(60)
        self.written.append((step, parts["model"]["w"].tolist()))


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits():
    run, weights = SlowRun(), torch.ones(2)
    with Saver(run, 0) as saver:
        saver.save(1, model={"w": weights})
        weights.fill_(7)  # the next step
        assert run.written == []
        threading.Timer(0.2, run.go_on.set).start()
        saver.save(2, model={"w": weights})
        assert run.written[0] == (1, [1, 1])
    assert run.written == [(1, [1, 1]), (2, [7, 7])]
    assert saver.saved == 2


def test_a_fault_of_the_thread_reaches_training():
    class Broken(SlowRun):
        def save_checkpoint(self, step, **parts):
            raise KeyError("no such key")

    with Saver(Broken(), 0) as saver:
        saver.save(1, model={"w": torch.ones(2)})
        with pytest.raises(KeyError, match="no such key"):
            saver.wait()


def test_a_run_that_is_stopped_at_once_completes_its_checkpoint(tmp_path, monkeypatch):
    save, begun = RunFolder.save_checkpoint, threading.Event()

    def slowly(self, step, **parts):
        begun.set()
        time.sleep(0.3)
        save(self, step, **parts)

    def stop(*_, **__):
        if begun.is_set():
            raise KeyboardInterrupt  # as a second Ctrl-C

    monkeypatch.setattr(RunFolder, "save_checkpoint", slowly)
    monkeypatch.setattr("flowdopr.train.loop.Trainer._look", stop)
    config = tiny(tmp_path, "train.checkpoint_every=3", "train.steps=100")
    with pytest.raises(KeyboardInterrupt):
        train(config)
    run = RunFolder.open(tmp_path / "runs" / "tiny")
    [step] = run.steps()
    run.check(step)
