"""The picture of scripts/weight_spectra.py."""

import re
import sys

import numpy as np
import pytest
from PIL import Image
from script_modules import load_script

from flowdopr.config import load_config
from flowdopr.train import train

spectra = load_script("weight_spectra.py")


def test_the_spectra_of_two_runs_are_drawn(tmp_path, monkeypatch, capsys):
    settings = ["model.depth=1", "model.hidden_size=16", f"output={tmp_path}"]
    settings += ["train.steps=2", "train.warmup_steps=0", "train.checkpoint_every=1"]
    for name, pc in (("plain", "null"), ("pc", "{}")):
        train(load_config("quickstart", [*settings, f"name={name}", f"model.pc={pc}"]))
    picture = tmp_path / "spectra.png"
    given = [str(tmp_path / "plain"), str(tmp_path / "pc"), "--out", str(picture)]
    monkeypatch.setattr(sys, "argv", ["weight_spectra.py", *given])
    capsys.readouterr()
    spectra.main()
    assert np.ptp(np.asarray(Image.open(picture))) > 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(spectra.LAYERS)
    for line in lines:
        numbers = re.search(r"step 2, .*: raw (.*) and (.*), in use (.*) and (.*)$", line)
        raw, in_use = np.array(numbers.groups(), float).reshape(2, 2)
        assert (in_use > 1.2 * raw).all() if line.startswith("pc") else (in_use == raw).all()


def test_a_pattern_without_a_layer_is_refused():
    with pytest.raises(ValueError, match="'mlp' finds no weight matrix"):
        spectra.spectrum({}, "mlp")
