"""Batched matrix functions, the precision of arithmetic, and the shards of tensors."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
HALF_PRECISION = (torch.bfloat16, torch.float16)
MAX_STACKED_ELEMENTS = 2**25  # bounds the memory of one batched call: 128 MiB in float32


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products and convolutions of float32 tensors in true float32, without TF32, whatever
    the program has set. Autocast is not affected."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    with _precision("ieee", cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv):  # pyright: ignore
        yield


@contextlib.contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """A GPU's matrix products in TF32 where `allowed`, else as the program has set them."""
    with _precision("tf32", *([torch.backends.cuda.matmul] if allowed else [])):
        yield


@contextlib.contextmanager
def _precision(precision: str, *backends: Any) -> Iterator[None]:
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = precision
    try:
        yield
    finally:
        for backend, old in zip(backends, before, strict=True):
            backend.fp32_precision = old


@contextlib.contextmanager
def without_autocast(devices: Iterable[torch.device]) -> Iterator[None]:
    """Operations on these devices in the precision of their tensors, whatever autocast says."""
    with contextlib.ExitStack() as stack:
        for kind in {device.type for device in devices}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def in_float32(parameters: Iterable[Tensor]) -> Iterator[None]:
    """bfloat16 and float16 parameters and their gradients are float32 in here, without autocast;
    at the end the parameters are rounded to their own precision, once, in their own memory.

    Sharded ones (DTensor), whose data cannot be exchanged, stay as they are.
    """
    parameters = list(parameters)
    halves = [p for p in parameters if p.dtype in HALF_PRECISION and not isinstance(p, DTensor)]
    stored = [(p.data, p.grad) for p in halves]
    with without_autocast(p.device for p in parameters), torch.no_grad():
        for p, (data, grad) in zip(halves, stored, strict=True):
            _exchange(p, data.float(), None if grad is None else grad.float())
        try:
            yield
        finally:
            for p, (data, _) in zip(halves, stored, strict=True):
                wide = p.data
                _exchange(p, data, None if p.grad is None else p.grad.to(data.dtype))
                p.copy_(wide)


def _exchange(parameter: Tensor, data: Tensor, grad: Tensor | None) -> None:
    parameter.grad = None  # which torch requires to have the dtype of its parameter
    parameter.data = data
    parameter.grad = grad


def newton_schulz(
    matrices: Tensor,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Approximate msgn(X) = (X X^T)^(-1/2) X of a batch of matrices (K, rows, cols).

    Five quintic steps x <- a x + b x^3 + c x^5 bring the singular values to about 0.7 to 1.2, not
    to exactly 1 (Jordan et al., "Muon", 2024). The result has the computing `dtype`: unless given,
    bfloat16 on CUDA and the input's own precision, float32 at least, elsewhere. A zero matrix
    stays zero.
    """
    if dtype is None:
        dtype = torch.promote_types(matrices.dtype, torch.float32)
        if matrices.is_cuda and dtype == torch.float32:
            dtype = torch.bfloat16
    a, b, c = coefficients
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def same_shape(tensors: list[Tensor]) -> list[list[int]]:
    """Indices of `tensors` in lists that can be stacked: one shape, dtype and device, and at most
    `MAX_STACKED_ELEMENTS` in all."""
    found: dict[tuple, list[int]] = {}
    for index, tensor in enumerate(tensors):
        found.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(index)
    chunks = []
    for indices in found.values():
        size = max(1, MAX_STACKED_ELEMENTS // max(1, tensors[indices[0]].numel()))
        chunks += [indices[i : i + size] for i in range(0, len(indices), size)]
    return chunks


def stack_blocks(tensors: list[Tensor], blocks: int) -> Tensor:
    """K tensors of one shape as matrices (K * blocks, rows, cols): `blocks` of them lie along the
    first axis of each tensor, and its other axes are flattened into columns.

    Each rank gathers the whole matrices of sharded tensors (DTensor).
    """
    stacked = torch.stack([t.full_tensor() if isinstance(t, DTensor) else t for t in tensors])
    rows = stacked.shape[1] // blocks
    return stacked.reshape(len(tensors) * blocks, rows, -1)


def unstack_blocks(stacked: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Inverse of `stack_blocks`: tensors of the shape, dtype and placement of `like`."""
    shape = (len(like), *like[0].shape)
    tensors = list(stacked.reshape(shape).to(like[0].dtype).unbind(0))
    return [
        distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)
        if isinstance(p, DTensor)
        else tensor
        for tensor, p in zip(tensors, like, strict=True)
    ]


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor (DTensor) that this process holds; other tensors unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_shard(rows: Tensor, tensor: Tensor) -> Tensor:
    """The inverse of `local`: `rows` as the shard of a DTensor placed as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return rows
    return DTensor.from_local(
        rows,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def signs(tensors: list[Tensor]) -> list[Tensor]:
    """The sign of each tensor, also of DTensors, for which torch 2.11 has no foreach form."""
    found = torch._foreach_sign([local(tensor) for tensor in tensors])
    return [like_shard(sign, tensor) for sign, tensor in zip(found, tensors, strict=True)]


def laid_out_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor` with the strides of `parameter`, which has its shape.

    torch's fused optimizers on the CPU go through weights, gradients and state in memory order,
    whatever their strides.
    """
    if tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
