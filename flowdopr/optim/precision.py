"""In what precision products of float32 matrices are taken: set for a while, then given back."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


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


@contextlib.contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Where `allowed`, a GPU's matrix products in TF32; else as the program has set."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if allowed else before
    try:
        yield
    finally:
        matmul.fp32_precision = before
