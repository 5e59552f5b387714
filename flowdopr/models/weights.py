"""A hash of a module's weights."""

import hashlib

import torch
from torch import nn


def weights_sha256(model: nn.Module) -> str:
    """sha256 over the names, types and bytes of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
