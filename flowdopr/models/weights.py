"""A hash of a module's weights, or of any tensors."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def weights_sha256(model: nn.Module) -> str:
    """`tensors_sha256` of all weights."""
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the names, types and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
