"""Golden runs: from a config to metrics.jsonl, 20 steps of every optimizer on both models.

A change of these numbers is seen here and must be meant. Losses and final weights are compared
bitwise where torch and the processor are those of the recording, and up to rounding elsewhere.
`python tests/golden/test_golden_runs.py` records new ones.
"""

import hashlib
import json
import platform
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowdopr.config import load_config
from flowdopr.train import train

GOLDEN = Path(__file__).with_name("golden_runs.json")
CONFIG = """
name: golden
data: {name: digits}
train:
  steps: 20
  global_batch_size: 24
  warmup_steps: 3
  lr_decay: cosine
  ema_decays: [0.9]
  log_every: 1
  validate_every: 10
sample: {num_images: 1}
"""
MODELS = {
    "dit": "{name: dit, depth: 2, hidden_size: 32, num_heads: 2, patch_size: 2}",
    "unet": "{name: unet, channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, "
    "attention_resolutions: [4]}",
}
OPTIMIZERS = {
    "sgd": "{name: sgd, lr: 0.1, momentum: 0.9}",
    "adamw": "{name: adamw, lr: 0.01, weight_decay: 0.1}",
    "muon": "{name: muon, lr: 0.02}",
    "signum": "{name: signum, lr: 0.002}",
    "adamuon": "{name: adamuon, lr: 0.01}",
    "rownorm": "{name: rownorm, lr: 0.01}",
    "soap": "{name: soap, lr: 0.003}",
    "kfac": "{name: kfac, lr: 0.01}",
    "dopr-sgd": "{name: dopr-sgd, lr: 0.1, momentum: 0.9}",
    "dopr-adamw": "{name: dopr-adamw, lr: 0.01, weight_decay: 0.1}",
    "dopr-muon": "{name: dopr-muon, lr: 0.02}",
    "dopr-signum": "{name: dopr-signum, lr: 0.002}",
    "dopr-adamuon": "{name: dopr-adamuon, lr: 0.01}",
    "dopr-rownorm": "{name: dopr-rownorm, lr: 0.01}",
    "dopr-soap": "{name: dopr-soap, lr: 0.003}",
    "sandwich": "{name: dopr-muon, lr: 0.02, "
    "dopr: {form: sandwich, damping: 1.0, refresh_every: 4}}",
    "power": "{name: dopr-adamw, lr: 0.01, dopr: {power: 0.5, damping: 0.1, refresh_every: 4}}",
    "rules": "{name: dopr-muon, lr: 0.02, dopr: {damping: [1.0, 0.1, 10], max_rows: 64, "
    "max_side: 16, refresh_every: 4, conv_mode: full, "
    "rules: [{pattern: time, mode: none}, {pattern: qkv, mode: diagonal}]}}",
}
# Other kernels (ATEN_CPU_CAPABILITY=avx2) move AdaMuon, which takes signs, by up to 1.5e-3 and the
# others by up to 2e-5.
TOLERANCE = 1e-2
CASES = [f"{model}/{optimizer}" for model in MODELS for optimizer in OPTIMIZERS]


def run(case: str, folder: Path) -> dict:
    """The losses of every step and of both validations, and a hash of the final weights."""
    model, optimizer = case.split("/")
    path = folder / "golden.yaml"
    settings = OPTIMIZERS[optimizer]
    if model == "dit":  # it has no convolutions, and so refuses their mode
        settings = settings.replace("conv_mode: full, ", "")
    path.write_text(f"{CONFIG}model: {MODELS[model]}\noptimizer: {settings}\n")
    made = train(load_config(path, [f"output={folder}"]))
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(made / "checkpoints" / "step-00000020" / "model.safetensors")
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "held_out": [line["held_out_loss"] for line in lines if "held_out_loss" in line],
        "weights_sha256": digest.hexdigest(),
    }


def machine() -> str:
    """What must be equal for numbers to be bitwise equal: torch and the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    wanted = ("model name", "cpu family", "model", "stepping")
    found = [line.split(":")[1].strip() for line in lines if line.split("\t")[0] in wanted]
    capability = torch.backends.cpu.get_cpu_capability()
    return " ".join([torch.__version__, platform.machine(), capability, *found[: len(wanted)]])


@pytest.mark.parametrize("case", CASES)
def test_a_run_repeats_the_recorded_one(case, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    found, recorded = run(case, tmp_path), golden["runs"][case]
    if golden["machine"] == machine():
        assert found == recorded
    assert found["losses"] == pytest.approx(recorded["losses"], rel=TOLERANCE)
    assert found["held_out"] == pytest.approx(recorded["held_out"], rel=TOLERANCE)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        places = {case: Path(name) / case for case in CASES}
        for place in places.values():
            place.mkdir(parents=True)
        runs = {case: run(case, place) for case, place in places.items()}
    GOLDEN.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
