"""The damped inverse of Sigma, for many matrices at once.

Every form of activation preconditioning multiplies by a matrix T from the right. With the mean
eigenvalue m = tr(Sigma) / d,

    S = (Sigma / m + gamma I) / (1 + gamma)
    inverse     M = GP(G T),      T = S^-power                power 1 is the paper's
    sandwich    D = GP(G T) T^T,  T = L^-T,  L L^T = S        (L is Cholesky's factor)

(arXiv 2606.06418). The mean eigenvalue of S is 1 whatever the scale of the layer's inputs and the
damping, and T tends to the identity as the damping grows. So Adam's epsilon keeps its meaning, and
a damping that falls does not make M grow by 1 + gamma, which Adam's second moment would follow
late. Matrices are factored in the precision of the statistics, without TF32.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """Which matrix T is: the inverse to a power, or the sandwich's triangular factor."""

    power: float = 1.0
    sandwich: bool = False


def smallest_pivot(dtype: torch.dtype) -> float:
    """The smallest pivot that is more than rounding, for matrices of unit mean eigenvalue."""
    return 10 * torch.finfo(dtype).eps


def invert(
    stacks: Sequence[Tensor],
    scales: Sequence[Tensor],
    gammas: Sequence[Tensor],
    form: Form,
) -> tuple[list[Tensor], list[Tensor]]:
    """T for each stack of symmetric matrices, and whether its damping was too small for one.

    Nothing here waits for the device, except for the eigenvalues of a power other than 1.

    Args:
        stacks: (g, b, s, s) each, of which only the lower triangles are read.
        scales: their mean eigenvalues m, (g, 1, 1, 1) each.
        gammas: their dampings, of shape ().

    Returns:
        T (g, b, s, s) for each stack, and a truth value of shape () for each. A matrix that has no
        Cholesky factor is replaced by its diagonal; for a power other than 1 its smallest
        eigenvalues are lifted.
    """
    batches: dict[tuple[int, torch.dtype, torch.device], list[int]] = defaultdict(list)
    for index, stack in enumerate(stacks):
        batches[stack.shape[-1], stack.dtype, stack.device].append(index)
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for members in batches.values():
        # A mean of 0 belongs to an input that is always zero, whose T is the identity.
        zeros = [~(scales[i] > 0) for i in members]
        means = [scales[i].masked_fill(zero, 1) for i, zero in zip(members, zeros, strict=True)]
        sizes = [stacks[i].shape[0] * stacks[i].shape[1] for i in members]
        unit = torch.cat([stacks[i].flatten(0, 1) for i in members])
        for piece, i, mean, zero in zip(unit.split(sizes), members, means, zeros, strict=True):
            matrices = piece.view_as(stacks[i]).div_(mean)
            matrices.diagonal(dim1=-2, dim2=-1).add_(zero[..., 0])
        each = [gammas[i].to(unit).expand(size) for i, size in zip(members, sizes, strict=True)]
        transforms, failed = _transform(unit, torch.cat(each), form)
        for i, piece, bad in zip(
            members, transforms.split(sizes), failed.split(sizes), strict=True
        ):
            # One layout however T was made, so that products round alike after a resume.
            done[i] = piece.view_as(stacks[i]).contiguous(), bad.any()
    in_order = [done[i] for i in range(len(stacks))]
    return [transform for transform, _ in in_order], [bad for _, bad in in_order]


def _transform(unit: Tensor, gammas: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """T of (N, s, s) matrices of unit mean eigenvalue, of which it makes S with the gammas (N,) in
    place, and whether these were too small, (N,)."""
    floor = smallest_pivot(unit.dtype)
    power = 0.5 if form.sandwich else form.power
    unit.diagonal(dim1=-2, dim2=-1).add_(gammas[:, None])
    unit.div_(1 + gammas[:, None, None])
    if unit.shape[-1] == 1:
        none = torch.zeros_like(gammas, dtype=torch.bool)
        return unit.clamp_min_(floor) ** -power, none
    if not form.sandwich and power != 1:
        values, vectors = torch.linalg.eigh(unit.nan_to_num_(0, 0, 0))
        powers = values.clamp_min(floor) ** -power
        return (vectors * powers[:, None]) @ vectors.mT, ~(values[:, 0] > floor)
    factors, failed = _factors(unit)
    if form.sandwich:
        eye = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
        return torch.linalg.solve_triangular(factors, eye, upper=False).mT, failed
    return torch.cholesky_inverse(factors), failed


def _factors(damped: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky's factors of (N, s, s) matrices, and which have none but for rounding, (N,); these
    get the roots of their diagonal."""
    floor = smallest_pivot(damped.dtype)
    factors, info = torch.linalg.cholesky_ex(damped)
    pivots = factors.diagonal(dim1=-2, dim2=-1)
    failed = (info != 0) | ~(pivots.square().amin(-1) > floor)
    # The diagonal of a Sigma that has overflowed is not finite either.
    roots = damped.diagonal(dim1=-2, dim2=-1).nan_to_num(1, 1).clamp_min(floor).sqrt()
    factors.masked_fill_(failed[:, None, None], 0)
    pivots = factors.diagonal(dim1=-2, dim2=-1)
    pivots.copy_(torch.where(failed[:, None], roots, pivots))
    return factors, failed
