"""Constructing a trainer loads the newest checkpoint and writes nothing."""

import shutil

import torch
from tiny import tiny

from flowdopr.latents import build_datasets
from flowdopr.runs.folder import RunFolder
from flowdopr.train import Trainer, train
from flowdopr.train.log import run_log
from flowdopr.train.looks import GRID, HELD_OUT
from flowdopr.train.start import build_components, make_accelerator


def test_a_process_that_has_nothing_to_look_at_waits_for_the_first(tmp_path, monkeypatch):
    """The first process may have written the losses and grid of a resumed step before another one
    looks for them: all must meet at the same barrier, or they wait for each other for ever."""
    config = tiny(tmp_path)
    run = RunFolder.open(train(config))
    datasets, accelerator = build_datasets(config), make_accelerator(config)
    trainer = Trainer(config, accelerator, datasets, build_components(config, datasets.info), run)
    met = []
    monkeypatch.setattr(accelerator, "wait_for_everyone", lambda: met.append(trainer.step))
    before = contents(run.path)
    done = trainer.looks.done(trainer.step)
    assert done == {HELD_OUT, GRID}
    trainer._look(done)
    assert met == [8]
    assert contents(run.path) == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_constructing_a_trainer_changes_no_file(tmp_path):
    config = tiny(tmp_path, "train.checkpoint_every=4")
    run = RunFolder.open(train(config))
    shutil.rmtree(run.checkpoint_path(8))  # metrics.jsonl now goes beyond the newest checkpoint
    before = contents(run.path)
    datasets, accelerator = build_datasets(config), make_accelerator(config)
    components = build_components(config, datasets.info)
    with run_log(run.path / "log.txt"):
        trainer = Trainer(config, accelerator, datasets, components, run)
    assert trainer.step == 4
    assert contents(run.path) == before
    saved = run.load_weights(4, "raw")
    assert all(
        torch.equal(value, saved[key]) for key, value in components.model.state_dict().items()
    )


def test_training_does_without_the_attention_of_cudnn(tmp_path):
    """Its gradient of 64 tokens in bfloat16 can be NaN on H100 and H200."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    make_accelerator(tiny(tmp_path))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
