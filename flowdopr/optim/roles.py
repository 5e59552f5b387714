"""Which parameter is what: the one place that decides who updates a parameter and who decays it.

The role of a parameter follows from the module that owns it:

    matrix     weight of a Linear, projections of nn.MultiheadAttention
    conv       weight of a convolution, transposed or not, in any number of dimensions
    embedding  weight of an Embedding
    norm       weight and bias of a normalisation layer
    bias       any other parameter whose name ends in "bias"
    table      another tensor of two or more dimensions, such as learned positions
    vector     another tensor of fewer dimensions

A weight under `torch.nn.utils.parametrize` has the role of the layer's weight if it has its shape:
the parameter inside is what the optimizer moves. Weight decay is for matrices and convolutions
alone. A module may say that its weight holds several matrices stacked along the rows (q, k and v;
the chunks of an adaLN modulation) with an integer attribute `fused_blocks`; the groups of a
convolution count as such blocks as well.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from flowdopr.patterns import finder, patterns_in

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
DECAYED = ("matrix", "conv")


@dataclass(frozen=True)
class Role:
    """What one parameter tensor is.

    Attributes:
        name: its name in `model.named_parameters()`.
        parameter: the tensor itself.
        kind: one of the roles listed at the top of this file.
        blocks: how many matrices are stacked along its first axis.
    """

    name: str
    parameter: nn.Parameter
    kind: str
    blocks: int = 1


def parameter_roles(model: nn.Module) -> list[Role]:
    """The role of every parameter of `model`, each tensor once, in the model's order.

    A tensor shared by several modules takes the role of the first, except that sharing with an
    Embedding makes it an embedding whatever the order.

    Raises:
        ValueError: a `fused_blocks` that does not divide the rows of its weight.
    """
    roles: dict[nn.Parameter, Role] = {}
    inside: dict[nn.Parameter, tuple[str, int]] = {}  # kind and blocks of parametrized weights
    for prefix, module in model.named_modules():
        if parametrize.is_parametrized(module):
            inside |= _parametrized(module)
        for leaf, parameter in module.named_parameters(recurse=False):
            kind, blocks = inside.get(parameter) or (
                _kind(module, leaf, parameter),
                _blocks(module, leaf, parameter),
            )
            known = roles.get(parameter)
            if known is None:
                name = f"{prefix}.{leaf}" if prefix else leaf
                roles[parameter] = Role(name, parameter, kind, blocks)
            elif kind == "embedding":
                roles[parameter] = replace(known, kind=kind, blocks=1)
    for role in roles.values():
        rows = role.parameter.shape[0] if role.parameter.ndim else 1
        if role.blocks < 1 or rows % role.blocks:
            raise ValueError(
                f"parameter '{role.name}' has {rows} rows, which fused_blocks={role.blocks} "
                "does not divide: set fused_blocks to the number of stacked matrices"
            )
    return list(roles.values())


def _parametrized(module: nn.Module) -> dict[nn.Parameter, tuple[str, int]]:
    """Kind and blocks of the parameters inside the parametrized tensors of `module` that have the
    shape of the tensor they make."""
    found = {}
    for leaf, inner in module.parametrizations.items():  # pyright: ignore
        training = {part: part.training for part in inner.modules()}
        inner.eval()  # spectral_norm changes its buffers whenever it runs in training mode
        whole = getattr(module, leaf)
        for part, mode in training.items():
            part.training = mode
        for parameter in inner.parameters(recurse=False):
            if parameter.shape == whole.shape:
                found[parameter] = (_kind(module, leaf, whole), _blocks(module, leaf, whole))
    return found


def _kind(module: nn.Module, leaf: str, parameter: torch.Tensor) -> str:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(module, NORMS):
        return "norm"
    if leaf.endswith("bias"):
        return "bias"
    if isinstance(module, nn.Linear) or (
        isinstance(module, nn.MultiheadAttention) and leaf.endswith("proj_weight")
    ):
        return "matrix"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    return "table" if parameter.ndim >= 2 else "vector"


def _blocks(module: nn.Module, leaf: str, parameter: torch.Tensor) -> int:
    if parameter.ndim < 2:
        return 1
    blocks = int(getattr(module, "fused_blocks", 1))
    if isinstance(module, nn.modules.conv._ConvNd):
        blocks *= module.groups
    if isinstance(module, nn.MultiheadAttention) and leaf == "in_proj_weight":
        blocks *= 3
    return blocks


def parameter_groups(
    model: nn.Module,
    gp: str,
    *,
    weight_decay: float,
    adamw_for: Sequence[str] | None = None,
) -> list[dict]:
    """Parameter groups for every trainable parameter of `model`.

    Args:
        gp: name of the method, written into each group under the key "gp".
        weight_decay: given to matrices and convolutions; all other groups get 0.
        adamw_for: None if the method updates every parameter alike. Otherwise it updates matrices
            and convolutions only, everything else goes to groups with gp "adamw", and so do the
            matrices whose names match this regular expression, or one of these (first and last
            layers, say). The method's groups then carry `fused_blocks`.

    Raises:
        ValueError: a pattern that is no regular expression or matches no parameter, a model without
            trainable parameters, or an embedding with sparse gradients, which SGD alone can use.
    """
    roles = [role for role in parameter_roles(model) if role.parameter.requires_grad]
    if not roles:
        raise ValueError(f"{type(model).__name__} has no trainable parameter to optimize")
    for name, module in model.named_modules() if gp != "sgd" else ():
        if getattr(module, "sparse", False) and any(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"embedding '{name}' has sparse gradients, which {gp} cannot use: build it with "
                "sparse=False, or use sgd"
            )
    found = {pattern: _finder(pattern) for pattern in patterns_in(adamw_for or ())}
    for pattern, finds in found.items():
        if not any(finds(role.name) for role in roles):
            raise ValueError(f"adamw_for: pattern '{pattern}' matches no parameter of the model")
    groups: dict[tuple, dict] = {}
    for role in roles:
        decay = weight_decay if role.kind in DECAYED else 0.0
        name, blocks = gp, 1
        if adamw_for is not None:
            if role.kind in DECAYED and not any(finds(role.name) for finds in found.values()):
                blocks = role.blocks
            else:
                name = "adamw"
        group = {"params": [], "gp": name, "fused_blocks": blocks, "weight_decay": decay}
        groups.setdefault((name, blocks, decay), group)["params"].append(role.parameter)
    return list(groups.values())


def _finder(pattern: str) -> Callable[[str], bool]:
    try:
        return finder(pattern)
    except ValueError as error:
        raise ValueError(f"adamw_for: pattern '{pattern}': {error}; correct it") from None


def split_by_dimension(group: dict[str, Any], gp: str) -> list[dict[str, Any]]:
    """A parameter group as one for `gp`, of its tensors of two or more dimensions, and one for
    AdamW, of the rest; without those that would be empty."""
    parts = []
    for name, of_matrices in ((gp, True), ("adamw", False)):
        chosen = [i for i, p in enumerate(group["params"]) if (p.ndim >= 2) == of_matrices]
        lists = [key for key in ("params", "param_names") if key in group]
        if chosen:
            taken = {key: [group[key][i] for i in chosen] for key in lists}
            parts.append({**group, **taken, "gp": name})
    return parts


def check_claimed(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless each trainable parameter of `model` is in exactly one group."""
    owners = Counter(p for group in optimizer.param_groups for p in group["params"])
    for role in parameter_roles(model):
        claims = owners[role.parameter]
        if claims > 1:
            raise ValueError(f"parameter '{role.name}' is in {claims} groups: leave it in one")
        if claims == 0 and role.parameter.requires_grad:
            raise ValueError(
                f"parameter '{role.name}' is in no group of the optimizer: "
                "add it to one, or set requires_grad=False"
            )


def format_roles(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A table of every parameter: name, shape, role, AP mode, GP and weight decay.

    `optimizer` is a bare optimizer or a DoPr around one, whose `roles()` give the AP mode.
    Frozen parameters are listed with GP "frozen".

    Raises:
        ValueError: see `check_claimed`.
    """
    check_claimed(model, optimizer)
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    ap_of = {name: mode for name, _, mode, _ in getattr(optimizer, "roles", list)()}
    default_gp = type(getattr(optimizer, "optimizer", optimizer)).__name__.lower()
    rows = [("parameter", "shape", "role", "AP", "GP", "weight decay")]
    for role in parameter_roles(model):
        shape = " x ".join(map(str, role.parameter.shape)) or "scalar"
        group = group_of.get(role.parameter)
        gp, decay = "frozen", "-"
        if group is not None:
            gp = str(group.get("gp", default_gp))
            gp += f" in {group['fused_blocks']} blocks" if group.get("fused_blocks", 1) > 1 else ""
            decay = f"{group.get('weight_decay', 0.0):g}"
        rows.append((role.name, shape, role.kind, ap_of.get(role.name, "none"), gp, decay))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
