"""The damped inverse of Sigma, in batches of one size.

Every form of activation preconditioning is a matrix T multiplied from the right:
  M = G T with T = (Sigma / m + gamma I)^-alpha, m the mean eigenvalue tr(Sigma) / d, alpha = 1
      in the paper (arXiv 2606.06418); and
  D = GP(G T) T^T with T = L^-T, L L^T = Sigma / m + gamma I: the Cholesky "sandwich".
Dividing by m gives every layer a Sigma of unit mean eigenvalue, so that gamma alone and not the
scale of the activations decides the size of M; `unit_scale=False` multiplies m back.
Factors are taken in the precision of the statistics, without TF32.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_RAISES = 12


@dataclass(frozen=True)
class Form:
    """What T is: the power alpha of the inverse, or the sandwich's triangular factor."""

    power: float = 1.0
    sandwich: bool = False
    unit_scale: bool = True


@dataclass
class Inverses:
    """T of every layer, (G, B, s, s), and the damping of those that needed more than asked."""

    transforms: list[Tensor]
    raised: dict[int, float]


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products in true float32, whatever the program has set for its own."""
    mkldnn: Any = torch.backends.mkldnn  # its attributes are made at run time
    backends = (torch.backends.cuda.matmul, mkldnn.matmul, mkldnn.conv)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def invert(
    stacks: Sequence[Tensor],
    scales: Sequence[Tensor],
    damping: float,
    form: Form,
    strength: float = 1.0,
) -> Inverses:
    """T for each symmetric stack (G, B, s, s), of which only the lower triangles are read.

    Matrices of one size are factored together, after division by their `scales`, the mean
    eigenvalues (G, 1, 1, 1). `strength` blends T with the identity: 1 is the full form, 0 leaves
    the gradient alone. A matrix that cannot be factored gets ten times its damping until it can;
    one with a value that is not finite raises ValueError.
    """
    batches: dict[tuple[int, torch.dtype, torch.device], list[int]] = defaultdict(list)
    for index, stack in enumerate(stacks):
        batches[stack.shape[-1], stack.dtype, stack.device].append(index)
    done: dict[int, Tensor] = {}
    raised: dict[int, float] = {}
    for members in batches.values():
        means = [torch.where(scales[i] > 0, scales[i], 1.0) for i in members]  # 0: a dead input
        sizes = [stacks[i].shape[0] * stacks[i].shape[1] for i in members]
        unit = torch.cat([stacks[i].flatten(0, 1) for i in members])
        for part, i, mean in zip(unit.split(sizes), members, means, strict=True):
            part.view_as(stacks[i]).div_(mean)
        transforms, gammas = _transform(unit, damping, form)
        for i, mean, part, used in zip(
            members, means, transforms.split(sizes), gammas.split(sizes), strict=True
        ):
            part = part.view_as(stacks[i])
            if not form.unit_scale:
                part = part * mean ** (-0.5 if form.sandwich else -form.power)
            if strength != 1.0:
                part = part * strength
                part.diagonal(dim1=-2, dim2=-1).add_(1 - strength)
            # One layout wherever T comes from, so that products round alike after a resume.
            done[i] = part.contiguous()
            if (worst := used.max().item()) > damping:
                raised[i] = worst
    return Inverses([done[i] for i in range(len(stacks))], raised)


def _transform(unit: Tensor, damping: float, form: Form) -> tuple[Tensor, Tensor]:
    """T of (N, s, s) matrices of unit scale, and the dampings it took, (N,) on the host.

    Adds the damping to `unit` in place.
    """
    if unit.shape[-1] == 1:
        gamma = max(damping, _floor(unit))
        power = 0.5 if form.sandwich else form.power
        return (unit + gamma) ** -power, torch.full((unit.shape[0],), damping, dtype=torch.double)
    factors, gammas = factor(unit, damping)
    if form.sandwich:
        eye = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
        return torch.linalg.solve_triangular(factors, eye, upper=False).mT, gammas
    if form.power == 1:
        return torch.cholesky_inverse(factors), gammas
    values, vectors = torch.linalg.eigh(unit)
    powers = values.clamp_min(_floor(unit)) ** -form.power
    return (vectors * powers[:, None]) @ vectors.mT, gammas


def factor(unit: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The Cholesky factors of Sigma + gamma I, made in place in `unit` (N, s, s), and the gammas.

    One host synchronisation an attempt.
    """
    gammas = torch.full((unit.shape[0],), damping, dtype=torch.double)
    missing = gammas
    for _ in range(MAX_RAISES):
        unit.diagonal(dim1=-2, dim2=-1).add_(missing.to(unit)[:, None])
        factors, info = torch.linalg.cholesky_ex(unit)
        pivots = factors.diagonal(dim1=-2, dim2=-1).square().amin(-1)
        failed = ((info != 0) | ~(pivots > _floor(unit))).cpu()
        if not failed.any():
            return factors, gammas
        raised = torch.where(failed, (10 * gammas).clamp_min(_floor(unit)), gammas)
        gammas, missing = raised, raised - gammas
    raise ValueError(
        f"no Cholesky factor of a second-moment matrix with damping up to {gammas.max():.0e}: "
        "its values are not finite"
    )


def _floor(unit: Tensor) -> float:
    """The smallest pivot that is more than rounding, for matrices of unit mean eigenvalue."""
    return 10 * torch.finfo(unit.dtype).eps
