"""Training that starts from weights of a run, or of a file: `train.init_from`."""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flowdopr.config import ConfigError, load_config
from flowdopr.config.model import PCConfig
from flowdopr.disk import check_fit, file_sha256, reading
from flowdopr.models import pc_layers, update_spectral_norms
from flowdopr.models.dit import SIZES
from flowdopr.models.foreign import as_ours
from flowdopr.runs.folder import CONFIG, RunFolder

REMEDY = (
    "let train.init_from name a run folder, or a file of weights by safetensors or torch.save that "
    "docs/exchange.md lists"
)

MAPPED = "PC layers of some kind"
"""What named weights show of `model.pc` where it is set."""

REST = {
    "dit": "model.mlp_ratio, model.mlp and model.qk_norm",
    "unet": "model.channel_multipliers, model.num_res_blocks, model.attention_resolutions, "
    "model.scale_shift_norm and model.resample",
}


def load_initial(model: Any, init_from: str, pc: PCConfig | None = None) -> dict[str, str]:
    """Give `model` the weights in `init_from`, in place.

    Args:
        init_from: a file of weights that `as_ours` knows, by safetensors or torch.save, or a run
            folder, which stands for the average of its newest checkpoint that samples are drawn
            with. A model without PC layers gets the merged weights of a run that has them.
        pc: section `model.pc`, with which the PC layers of `model` were made.

    Returns:
        The file and its sha256, for versions.json.

    Raises:
        ConfigError, ValueError: no such file or checkpoint, weights that do not fit the model, or
            that are not finite.
    """
    path, wanted = Path(init_from), model.state_dict()
    run = RunFolder.open(path) if path.is_dir() else None
    if run is not None:
        path = run.weights_file(run.chosen_step(), "ema")
    if run is not None and run.config.model.pc and not pc_layers(model):
        found = run.load_model()[0].state_dict()
    else:
        found = _weights(path, model)
        _check_same_pc(found, path, pc)
    check_fit(found, wanted, path, _remedy(found, wanted, model))
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{path}: {name} has numbers that are not finite; let train.init_from name weights "
                "that have none, such as those of an earlier checkpoint"
            )
    model.load_state_dict(found)
    update_spectral_norms(model)
    return {"file": str(path.resolve()), "sha256": file_sha256(path)}


def _weights(path: Path, model: Any) -> Mapping[str, Tensor]:
    """The weights in a file, under the names of ours."""
    content = _content(path)
    with reading(path, REMEDY):  # tensors may lack the axes that their names promise
        try:
            return as_ours(content, model)
        except ValueError as error:
            refusal = error
    raise ValueError(f"{path}: {refusal}")


def _content(path: Path) -> Mapping[str, Any]:
    """What safetensors or torch.save wrote, on the CPU; the file cannot run code."""
    with reading(path, REMEDY):
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            # Training scripts of SiT and DiT store their options beside the weights, and all store
            # the optimizer's state, which a mapped file leaves on the disk.
            with torch.serialization.safe_globals([argparse.Namespace]):
                mapped = zipfile.is_zipfile(path)
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError:
            raise ValueError("it is not a file of tensors alone, and no other is opened") from None
        if not isinstance(found, Mapping):
            raise ValueError(f"it holds a {type(found).__name__} in place of named weights")
        return found


def _check_same_pc(found: Mapping[str, Tensor], path: Path, pc: PCConfig | None) -> None:
    """Check that PC layers made by `pc` compute what those of the weights `found` do, which have
    the same names and shapes at every level.

    Raises:
        ConfigError: they do not; only the config beside a checkpoint's weights tells.
    """
    beside = path.with_name(CONFIG)
    if not beside.is_file() or not any(".weight_map." in name for name in found):
        return
    theirs = load_config(beside, follow_base=False).model.pc
    if theirs and (pc is None or _function(pc) != _function(theirs)):
        value = json.dumps(theirs.model_dump(mode="json", exclude_defaults=True))
        raise ConfigError(f"{path}: has PC layers of other settings; set model.pc='{value}'")


def _function(pc: PCConfig) -> dict[str, Any]:
    """The settings that decide what a PC layer computes."""
    return pc.model_dump(exclude={"power_iterations"})


def _remedy(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: Any) -> str:
    """What to change so that the model has weights like `found`."""
    theirs, ours = (settings_of(tensors, model.image_shape[0]) for tensors in (found, wanted))
    other = {key: value for key, value in theirs.items() if ours.get(key) != value}
    if other.get("model.pc") == MAPPED:
        return "set model.pc to that of its run"
    if settings := [f"{key}={value}" for key, value in other.items() if "." in key]:
        return f"set {' '.join(settings)}"
    if other:
        facts = ", ".join(f"{value} {key}" for key, value in other.items())
        return f"its model has {facts}: train on data that have as many"
    if theirs:
        return f"set {REST[theirs['model.name']]} to those of its model"
    return REMEDY


def settings_of(tensors: Mapping[str, Tensor], channels: int) -> dict[str, Any]:
    """The settings of section `model`, and the number of classes, that named weights show.

    Args:
        channels: of the images, which a DiT's weights do not tell from the size of a patch.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    models = {"embed.weight": "dit", "x_embedder.proj.weight": "dit"}
    models |= {"stem.weight": "unet", "input_blocks.0.0.weight": "unet"}
    names = [models[name] for name in models if name in shapes]
    found: dict[str, Any] = {"model.name": names[0]} if names else {}
    if len(shapes.get("condition.time_1.weight", ())) != 2:  # another project's, as they are there
        return found
    label = shapes.get("condition.label.weight")
    mapped = any(".weight_map." in name for name in shapes)
    found["model.pc"] = MAPPED if mapped else "null"
    found["model.class_conditional"] = str(label is not None).lower()
    found |= {"classes": label[0] - 1} if label else {}
    if "stem.weight" in shapes:
        found["model.channels"] = shapes["condition.time_1.weight"][1]
    if len(shapes.get("embed.weight", ())) == 2:
        depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
        width, inputs = shapes["embed.weight"]
        size = next((name for name, known in SIZES.items() if known[:2] == (depth, width)), None)
        named = {"model.depth": depth, "model.hidden_size": width}
        found |= {"model.size": size} if size else named
        side = (inputs / channels) ** 0.5
        whole = {"model.patch_size": int(side)}
        found |= whole if side.is_integer() else {"channels x pixels of a patch": inputs}
    return found
