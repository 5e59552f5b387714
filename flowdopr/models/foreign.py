"""Weights of other projects' models, under the names and in the layout of ours.

- SiT and DiT, whose networks are the same: our DiT.
- ADM's U-Net, in ADM's code, torchcfm or flow_matching's example: our U-Net.

Shapes: C channels of an image, p side of a patch, D width, H heads, E = D / H.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flowdopr.models.dit import DiT
from flowdopr.models.layers import sincos_positions
from flowdopr.models.unet import UNet

Tensors = dict[str, Tensor]

STORED = ("ema", "ema_model", "model", "net_model")
"""The entries of a checkpoint that hold weights: averages first, as samples are drawn with them."""
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of DDP and torch.compile

SIT = {
    r"^x_embedder\.proj\.": "embed.",
    r"^t_embedder\.mlp\.0\.": "condition.time_1.",
    r"^t_embedder\.mlp\.2\.": "condition.time_2.",
    r"^y_embedder\.embedding_table\.": "condition.label.",
    r"\.attn\.": ".attention.",
    r"\.mlp\.fc1\.": ".mlp.up.",
    r"\.mlp\.fc2\.": ".mlp.down.",
    r"^(blocks\.\d+)\.adaLN_modulation\.1\.": r"\1.modulation.",
    r"^final_layer\.adaLN_modulation\.1\.": "final_modulation.",
    r"^final_layer\.linear\.": "final.",
}
ADM: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"^time_embed\.0\.": "condition.time_1.",
    r"^time_embed\.2\.": "condition.time_2.",
    r"^label_emb\.": "condition.label.",
    r"^input_blocks\.0\.0\.": "stem.",
    r"^input_blocks\.(\d+)\.": lambda found: f"down.{int(found[1]) - 1}.",
    r"^middle_block\.": "middle.",
    r"^output_blocks\.": "up.",
    r"^out\.0\.": "head_norm.",
    r"^out\.2\.": "head.",
    r"\.in_layers\.0\.": ".norm_1.",
    r"\.in_layers\.2\.": ".conv_1.",
    r"\.emb_layers\.1\.": ".modulation.",
    r"\.out_layers\.0\.": ".norm_2.",
    r"\.out_layers\.3\.": ".conv_2.",
    r"\.skip_connection\.": ".skip.",
    r"\.qkv\.": ".attention.qkv.",
    r"\.proj_out\.": ".attention.proj.",
}


def as_ours(content: Mapping[str, Any], model: nn.Module) -> Tensors:
    """The weights in a file, with the names, shapes and dtypes that those of `model` would have.

    Weights that fit no model of ours keep their own names or shapes, for a message that names them.

    Args:
        content: a state dict, ours or another project's, or a training checkpoint that has one.

    Raises:
        ValueError: weights of a network that computes something else than `model` would with them.
    """
    stored = next((key for key in STORED if isinstance(content.get(key), Mapping)), None)
    tensors = _unwrapped(content if stored is None else content[stored])
    if "x_embedder.proj.weight" in tensors and isinstance(model, DiT):
        tensors = _of_sit(tensors, model)
    elif "input_blocks.0.0.weight" in tensors and isinstance(model, UNet):
        tensors = _of_adm(tensors, model, heads_first=_heads_first(content, stored))
    wanted = model.state_dict()
    return {
        name: tensor.to(wanted[name].dtype) if name in wanted else tensor
        for name, tensor in tensors.items()
    }


def _unwrapped(stored: Mapping[str, Any]) -> Tensors:
    """The tensors of a state dict by the names that they have in the bare model."""
    found = {WRAPPERS.sub("", str(name)): value for name, value in stored.items()}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    shadows = [tensors[name] for name in tensors if name.startswith("shadow_params.")]
    if not shadows:
        return tensors
    # flow_matching's average: a list in the order of the parameters of the model beside it.
    names = [name.removeprefix("model.") for name in tensors if name.startswith("model.")]
    if len(names) != len(shadows):
        raise ValueError(f"has averages (shadow_params) of {len(shadows)} of {len(names)} weights")
    return dict(zip(names, shadows, strict=True))


def _renamed(tensors: Tensors, rules: Mapping[str, Any]) -> Tensors:
    found = {}
    for name, tensor in tensors.items():
        for pattern, ours in rules.items():
            name = re.sub(pattern, ours, name)
        linear = name == "embed.weight" or ".attention." in name  # theirs are convolutions
        found[name] = tensor.flatten(1) if linear and tensor.ndim > 2 else tensor
    return found


def _of_sit(tensors: Tensors, model: DiT) -> Tensors:
    if not isinstance(model.final_norm, nn.LayerNorm) or model.angles is not None:
        raise ValueError(
            "is of a SiT or DiT, which has layer norms and no rotary positions: set "
            "model.norm=layer and model.rope=false"
        )
    positions = tensors.pop("pos_embed", None)  # (1, N, D)
    if positions is not None:
        side = math.isqrt(positions.shape[-2])
        table = sincos_positions(side, side, positions.shape[-1])[None].to(positions)
        if positions.shape != table.shape or not torch.allclose(positions, table, atol=1e-3):
            raise ValueError("has learned positions (pos_embed); those of our DiT are fixed")
    patch = tensors["x_embedder.proj.weight"].shape[2:].numel()
    found = _renamed(tensors, SIT)
    for name in {"final.weight", "final.bias"} & found.keys():
        if len(found[name]) % patch == 0:
            # Theirs are (p p C) with those of the variance last, ours (C p p) without them.
            rows = found[name].unflatten(0, (patch, -1))[:, : model.image_shape[0]]
            found[name] = rows.transpose(0, 1).flatten(0, 1)
    return found


def _of_adm(tensors: Tensors, model: UNet, *, heads_first: bool | None) -> Tensors:
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    if odd := [norm for norm in norms if norm.num_groups != 32]:
        raise ValueError(
            f"is of ADM's U-Net, whose group norms have 32 groups; ours have {odd[0].num_groups} "
            f"for {odd[0].num_channels} channels, and 32 where model.channels is a multiple of 128"
        )
    found = _renamed(tensors, ADM)
    for name in {"head.weight", "head.bias"} & found.keys():
        if len(found[name]) == 2 * model.image_shape[0]:  # the second half is for the variance
            found[name] = found[name].chunk(2)[0]
    label = found.get("condition.label.weight")
    if label is not None and len(label) == model.num_classes and heads_first is not False:
        # ADM and torchcfm have no null label.
        found["condition.label.weight"] = torch.cat([label, torch.zeros_like(label[:1])])
    for name, module in model.named_modules():
        heads = getattr(module, "num_heads", 1)
        for part in {f"{name}.qkv.weight", f"{name}.qkv.bias"} & found.keys() if heads > 1 else ():
            if heads_first is None:
                raise ValueError(
                    "does not say how its queries, keys and values are stacked; save it as "
                    "{'ema_model': WEIGHTS} if by head (torchcfm, ADM without "
                    "use_new_attention_order), or as {'model': WEIGHTS, 'lr_schedule': None}"
                )
            if heads_first and len(found[part]) % (3 * heads) == 0:
                found[part] = rearrange(found[part], "(h s e) ... -> (s h e) ...", h=heads, s=3)
    return found


def _heads_first(content: Mapping[str, Any], stored: str | None) -> bool | None:
    """Whether the rows of ADM's qkv are (H 3 E), as torchcfm has them, and not (3 H E), as
    flow_matching and we do; None if the entries of the checkpoint do not tell."""
    if stored in ("ema_model", "net_model"):
        return True
    return False if "lr_schedule" in content else None
