"""The damped inverse of Sigma, in batches of one size.

Every form of activation preconditioning is a matrix T multiplied from the right:
  M = G T with T = (Sigma / m + gamma I)^-alpha, m the mean eigenvalue tr(Sigma) / d, alpha = 1
      in the paper (arXiv 2606.06418); and
  D = GP(G T) T^T with T = L^-T, L L^T = Sigma / m + gamma I: the Cholesky "sandwich".
Dividing by m gives every layer a Sigma of unit mean eigenvalue, so that gamma alone and not the
scale of the activations decides the size of M; `unit_scale=False` multiplies m back.
Factors are taken in the precision of the statistics, without TF32.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """What T is: the power alpha of the inverse, or the sandwich's triangular factor."""

    power: float = 1.0
    sandwich: bool = False
    unit_scale: bool = True


def invert(
    stacks: Sequence[Tensor],
    scales: Sequence[Tensor],
    gammas: Sequence[Tensor],
    form: Form,
    strength: float = 1.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """T for each symmetric stack (G, B, s, s), of which only the lower triangles are read, and
    whether `gammas`, dampings of shape (), were too small for one of its matrices.

    Matrices of one size are factored together, after division by their `scales`, the mean
    eigenvalues (G, 1, 1, 1). `strength` blends T with the identity: 1 is the full form, 0 leaves
    the gradient alone. A matrix that cannot be factored is taken for its diagonal; for a power
    other than 1 its smallest eigenvalues are lifted. Nothing here waits for the device, but these
    eigenvalues do.
    """
    batches: dict[tuple[int, torch.dtype, torch.device], list[int]] = defaultdict(list)
    for index, stack in enumerate(stacks):
        batches[stack.shape[-1], stack.dtype, stack.device].append(index)
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for members in batches.values():
        means = [torch.where(scales[i] > 0, scales[i], 1.0) for i in members]  # 0: a dead input
        sizes = [stacks[i].shape[0] * stacks[i].shape[1] for i in members]
        unit = torch.cat([stacks[i].flatten(0, 1) for i in members])
        for part, i, mean in zip(unit.split(sizes), members, means, strict=True):
            part.view_as(stacks[i]).div_(mean)
        each = [gammas[i].to(unit).expand(size) for i, size in zip(members, sizes, strict=True)]
        transforms, failed = _transform(unit, torch.cat(each), form)
        for i, mean, part, bad in zip(
            members, means, transforms.split(sizes), failed.split(sizes), strict=True
        ):
            part = part.view_as(stacks[i])
            if not form.unit_scale:
                part = part * mean ** (-0.5 if form.sandwich else -form.power)
            if strength != 1.0:
                part = part * strength
                part.diagonal(dim1=-2, dim2=-1).add_(1 - strength)
            # One layout wherever T comes from, so that products round alike after a resume.
            done[i] = part.contiguous(), bad.any()
    in_order = [done[i] for i in range(len(stacks))]
    return [transform for transform, _ in in_order], [bad for _, bad in in_order]


def _transform(unit: Tensor, gammas: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """T of (N, s, s) matrices of unit scale, to which it adds the gammas in place, and whether
    these were too small, (N,)."""
    floor = smallest_pivot(unit.dtype)
    power = 0.5 if form.sandwich else form.power
    if unit.shape[-1] == 1:
        none = torch.zeros_like(gammas, dtype=torch.bool)
        return (unit + gammas[:, None, None]).clamp_min(floor) ** -power, none
    if not form.sandwich and power != 1:
        unit.diagonal(dim1=-2, dim2=-1).add_(gammas[:, None])
        values, vectors = torch.linalg.eigh(unit.nan_to_num_(0, 0, 0))
        powers = values.clamp_min(floor) ** -power
        return (vectors * powers[:, None]) @ vectors.mT, ~(values[:, 0] > floor)
    factors, failed = factor(unit, gammas)
    # Of a Sigma that has overflowed the diagonal is not finite either.
    roots = unit.diagonal(dim1=-2, dim2=-1).nan_to_num(1, 1).clamp_min(floor).sqrt()
    factors.masked_fill_(failed[:, None, None], 0)
    pivots = factors.diagonal(dim1=-2, dim2=-1)
    pivots.copy_(torch.where(failed[:, None], roots, pivots))
    if form.sandwich:
        eye = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
        return torch.linalg.solve_triangular(factors, eye, upper=False).mT, failed
    return torch.cholesky_inverse(factors), failed


def factor(unit: Tensor, gammas: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factors of Sigma + gamma I, which it leaves in `unit` (N, s, s), and whether a
    matrix has none but for rounding, (N,); its factor then is undefined."""
    unit.diagonal(dim1=-2, dim2=-1).add_(gammas[:, None])
    factors, info = torch.linalg.cholesky_ex(unit)
    pivots = factors.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    return factors, (info != 0) | ~(pivots > smallest_pivot(unit.dtype))


def smallest_pivot(dtype: torch.dtype) -> float:
    """The smallest pivot that is more than rounding, for matrices of unit mean eigenvalue."""
    return 10 * torch.finfo(dtype).eps
