"""DoPr written once more, slowly: dense, float64, plain loops, no code shared with the fast path.

Nothing here is meant to train with. Tests hold the fast path against it, and a reader finds each
equation of arXiv 2606.06418 in one place.
"""

import itertools

import numpy as np
import torch
from torch import Tensor, nn


def layer_rows(module: nn.Module, x: Tensor) -> list[Tensor]:
    """z of a layer, one (n, d) float64 matrix for each group."""
    x = x.double()
    if isinstance(module, nn.Linear):
        return [torch.stack([x[index] for index in np.ndindex(*x.shape[:-1])])]
    if isinstance(module, nn.Embedding):
        rows = torch.zeros(x.numel(), module.num_embeddings, dtype=torch.float64)
        for i, index in enumerate(x.flatten().tolist()):
            rows[i, int(index)] = 1
        return [rows]
    if isinstance(module, nn.ConvTranspose2d):
        width = module.in_channels // module.groups
        pixels = [x[b, :, i, j] for b, i, j in np.ndindex(x.shape[0], *x.shape[2:])]
        return [
            torch.stack([pixel[g * width : (g + 1) * width] for pixel in pixels])
            for g in range(module.groups)
        ]
    if isinstance(module, nn.Conv2d):
        return [_patches(module, x, group) for group in range(module.groups)]
    raise TypeError(f"no reference for {type(module).__name__}")


def _patches(conv: nn.Conv2d, x: Tensor, group: int) -> Tensor:
    """Every patch of one group, entry by entry: (n, C / groups * k * k)."""
    width = conv.in_channels // conv.groups
    offsets = list(itertools.product(range(conv.kernel_size[0]), range(conv.kernel_size[1])))
    before, sizes = zip(*(_extent(conv, axis, x.shape[2 + axis]) for axis in (0, 1)), strict=True)
    rows = []
    for b, i, j in np.ndindex(x.shape[0], *sizes):
        row = []
        for channel, (a, c) in itertools.product(range(width), offsets):
            row.append(
                _pixel(
                    x[b, group * width + channel],
                    i * conv.stride[0] + a * conv.dilation[0] - before[0],
                    j * conv.stride[1] + c * conv.dilation[1] - before[1],
                    conv.padding_mode,
                )
            )
        rows.append(torch.stack(row))
    return torch.stack(rows)


def _extent(conv: nn.Conv2d, axis: int, size: int) -> tuple[int, int]:
    """(padding before the image, number of output positions) along one axis."""
    reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
    if conv.padding == "same":
        before, after = reach // 2, reach - reach // 2
    elif conv.padding == "valid":
        before = after = 0
    else:
        before = after = int(conv.padding[axis])
    return before, (size + before + after - reach - 1) // conv.stride[axis] + 1


def _pixel(image: Tensor, i: int, j: int, padding_mode: str) -> Tensor:
    """The pixel (i, j) of an image (H, W) that goes on outside as the padding mode says."""
    place = []
    for position, size in zip((i, j), image.shape, strict=True):
        if 0 <= position < size:
            place.append(position)
        elif padding_mode == "zeros":
            return torch.zeros((), dtype=image.dtype)
        elif padding_mode == "circular":
            place.append(position % size)
        elif padding_mode == "replicate":
            place.append(min(max(position, 0), size - 1))
        else:
            place.append(-position if position < 0 else 2 * (size - 1) - position)
    return image[place[0], place[1]]


def layer_matrices(module: nn.Module, grad: Tensor) -> list[Tensor]:
    """The weight gradient as one (rows, d) float64 matrix for each group, d as in `layer_rows`."""
    grad = grad.double()
    if isinstance(module, nn.Embedding):
        return [grad.T]
    if isinstance(module, nn.ConvTranspose2d):
        return [part.flatten(1).T for part in grad.chunk(module.groups)]
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    return [part.flatten(1) for part in grad.chunk(groups)]


def second_moment(rows: Tensor) -> Tensor:
    """Sigma = (1/n) sum_i z_i z_i^T, uncentred."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for row in rows.double():
        total += torch.outer(row, row)
    return total / rows.shape[0]


def average(moments: list[Tensor], cov_decay: float) -> Tensor:
    """The running average of Sigma after refreshes 0, 1, ... whose batch moments are given.

    A weighted mean: moment j counts (1 - decay_j) times all later decays, and
    decay_k = min(cov_decay, (1 + k) / (10 + k)).
    """
    decays = [min(cov_decay, (1 + k) / (10 + k)) for k in range(len(moments))]
    weights = [(1 - decays[j]) * float(np.prod(decays[j + 1 :])) for j in range(len(moments))]
    parts = [weight * moment for weight, moment in zip(weights, moments, strict=True)]
    return torch.stack(parts).sum(0) / sum(weights)


def shared_offsets(channels: Tensor, offsets: int, *, mean: bool) -> Tensor:
    """The patch Sigma that SUA assumes, from channel rows (n, c), ordered as a flat weight.

    I (x) E[x x^T] over offsets (x) channels; with the mean I (x) C + 1 1^T (x) mu mu^T.
    """
    moment, mu = second_moment(channels), channels.double().mean(0)
    eye, ones = torch.eye(offsets, dtype=torch.float64), torch.ones(offsets, offsets).double()
    outer = torch.outer(mu, mu)
    if not mean:
        return torch.kron(moment, eye)
    return torch.kron(moment - outer, eye) + torch.kron(outer, ones)


def damped(sigma: Tensor, damping: float) -> Tensor:
    """Sigma + gamma tr(Sigma) / d I."""
    d = sigma.shape[0]
    return sigma + damping * sigma.trace() / d * torch.eye(d, dtype=torch.float64)


def power(matrix: Tensor, exponent: float) -> Tensor:
    """A symmetric positive matrix to a real power, by its eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def precondition(
    grad: Tensor, sigma: Tensor, damping: float, *, alpha: float = 1.0, unit_scale: bool = True
) -> Tensor:
    """M = G (Sigma + gamma tr(Sigma)/d I)^-alpha; times ((1 + gamma) tr(Sigma)/d)^alpha for unit
    scale."""
    matrix = damped(sigma.double(), damping)
    inverse = torch.linalg.inv(matrix) if alpha == 1 else power(matrix, -alpha)
    mean = (1 + damping) * sigma.trace() / sigma.shape[0]
    scale = mean**alpha if unit_scale else 1.0
    return grad.double() @ inverse * scale


def precondition_dual(delta: Tensor, rows: Tensor, damping: float) -> Tensor:
    """M from output gradients (n, d_out) and z (n, d) by the dual form, for n below d:

    Delta^T (Z Z^T + n lambda I)^-1 Z n = Delta^T Z (Z^T Z / n + lambda I)^-1, G = Delta^T Z.
    """
    delta, rows = delta.double(), rows.double()
    n = rows.shape[0]
    ridge = damping * rows.square().sum() / n / rows.shape[1]
    gram = rows @ rows.T + n * ridge * torch.eye(n, dtype=torch.float64)
    return n * delta.T @ torch.linalg.solve(gram, rows)


def matrix_sign(matrix: Tensor) -> Tensor:
    """msgn(M) = U V^T, the direction of Muon in the limit of many iterations."""
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left @ right


def row_norm(matrix: Tensor) -> Tensor:
    """Each row divided by its length."""
    return matrix / matrix.norm(dim=1, keepdim=True)
