"""A saved autoencoder, and configs for a folder of pictures and for its latents."""

import json
from pathlib import Path
from typing import Any

import torch
from autoencoders import small_autoencoder

from flowdopr.config import Config, load_config, load_data_config

TRAINING = """
name: latent
data: {name: latents}
model: {name: dit, depth: 1, hidden_size: 16, num_heads: 2, patch_size: 2}
optimizer: {name: adamw, lr: 1e-3}
train: {steps: 4, global_batch_size: 4, ema_decays: [0.5], log_every: 2}
sample: {solver: {name: euler, steps: 2}, num_images: 4}
evaluate: {metrics: [fd], fid_num_images: 12}
"""


def save_autoencoder(folder: Path, *, seed: int = 0, gain: float = 1.0) -> Path:
    """A small autoencoder with random weights, saved in diffusers' format."""
    torch.manual_seed(seed)
    vae = small_autoencoder()
    with torch.no_grad():
        for weight in vae.quant_conv.parameters():
            weight.mul_(gain)
    vae.save_pretrained(folder)
    return folder


def source_config(root: Path, *overrides: str) -> Config:
    """The pictures at 16x16, by a file that has a section `data` alone."""
    path = root.with_name("source.yaml")
    data = {"name": "folder", "root": str(root), "image_size": 16, "held_out_fraction": 0.25}
    path.write_text(json.dumps({"data": data}))
    return load_data_config(path, overrides)


def training_config(root: Path, *overrides: str) -> Config:
    path = root.with_name("training.yaml")
    path.write_text(TRAINING)
    return load_config(path, [f"data.root={root}", f"output={root.parent}/runs", *overrides])


def notes_of(root: Path) -> dict[str, Any]:
    return json.loads((root / "latents.json").read_text())
