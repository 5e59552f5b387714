"""Replacements of torch functions that are faster on the CPU.

`linear`, `attention`, `product` and `upsampled_conv2d` differ from the functions they replace only
by rounding, `dropout` by which elements it drops.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

# F.linear calls MKL, which uses only half the width of AVX-512 on CPUs that are not Intel's and so
# halves the speed of a DiT. oneDNN's 1x1 convolution uses the full width on every x86 CPU.
ONEDNN_IS_FAST = (
    torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
)
# torch runs 1x1 convolutions of fewer images by a slower kernel. With fewer rows, MKL is faster.
ONEDNN_IMAGES, ONEDNN_MIN_ROWS = 16, 512
ONEDNN_MIN_PRODUCTS = 2**21  # multiplications in a product of matrices; up to these, MKL is faster
MAX_SCORES = 1024  # tokens up to which attention may keep a score for each pair
# Folding the kernel costs more than the products it saves when the image is smaller than this.
FOLD_MIN_PIXELS = 64


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, input (..., d_in) and weight (d_out, d_in) -> (..., d_out), computed by oneDNN
    where that is faster."""
    rows = input.shape[:-1].numel()
    suits = ONEDNN_IS_FAST and input.is_cpu and input.dtype == torch.float32
    # In bfloat16, to which autocast casts here, F.linear calls oneDNN itself, twice as fast.
    suits = suits and not torch.is_autocast_enabled("cpu")
    if not suits or rows < ONEDNN_MIN_ROWS or rows % ONEDNN_IMAGES:
        return F.linear(input, weight, bias)
    # Rows become the pixels of channels-last images one pixel high: views, no copies.
    pixels = input.reshape(ONEDNN_IMAGES, -1, input.shape[-1]).mT.unsqueeze(2)
    out = F.conv2d(pixels, weight[:, :, None, None], bias)
    return out.squeeze(2).mT.reshape(*input.shape[:-1], weight.shape[0])


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`F.scaled_dot_product_attention`, (B, H, N, E) each -> (B, H, N, E).

    In bfloat16 on the CPU the fused kernel is slower than in float32, and two products with all
    scores in memory are not.
    """
    suits = ONEDNN_IS_FAST and q.is_cpu and q.dtype == torch.bfloat16
    if not suits or k.shape[-2] > MAX_SCORES:
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return scores.softmax(-1) @ v


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, (..., n, k) and (..., k, m) with the same leading axes -> (..., n, m), without a
    gradient, computed by oneDNN where that is faster. Unlike `linear`, it suits any number of rows.
    """
    if not _suits_onednn(a, b):
        return a @ b
    # Parts of a matrix that are transposed would get oneDNN's slowest kernel.
    a = a if a.stride(-1) == 1 else a.contiguous()
    if a.shape[:-2].numel() == 1:
        return _inner_product(a.flatten(0, -2), b.flatten(0, -2)).view(*a.shape[:-1], b.shape[-1])
    square = a.shape[-1] == b.shape[-1]
    out = torch.empty_like(a) if square else a.new_empty(*a.shape[:-1], b.shape[-1])
    for place in itertools.product(*map(range, a.shape[:-2])):
        out[place] = _inner_product(a[place], b[place])
    return out


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    weight = b.mT if b.is_contiguous() else b.mT.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")


def add_product(sums: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """`sums.addmm_(a, b, alpha=alpha)` by `product` where that is faster."""
    if _suits_onednn(a, b):
        sums.add_(product(a, b), alpha=alpha)
    else:
        sums.addmm_(a, b, alpha=alpha)


def _suits_onednn(a: Tensor, b: Tensor) -> bool:
    suits = ONEDNN_IS_FAST and a.is_cpu and a.dtype == torch.float32
    return suits and a.shape[-2:].numel() * b.shape[-1] > ONEDNN_MIN_PRODUCTS


def dropout(input: Tensor, p: float, training: bool) -> Tensor:
    """`F.dropout`, on the CPU from 16 random bits an element.

    torch draws 32 bits for each element, one after the other, which took a twentieth of a U-Net's
    training step. On the CPU, p is rounded to a multiple of 2^-16, and the kept elements are scaled
    to match the rounded value.
    """
    dropped = round(p * 2**16)
    compiled = torch.compiler.is_compiling()  # the compiler draws and multiplies in one pass
    if not training or not input.is_cpu or compiled or dropped in (0, 2**16):
        return F.dropout(input, p, training)
    words = torch.empty((input.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: input.numel()]
    mask = torch.empty_like(input)
    in_memory_order = mask.as_strided(bits.shape, (1,))
    in_memory_order.copy_(bits >= dropped - 2**15).mul_(2**16 / (2**16 - dropped))
    return input * mask


def upsampled_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution with padding 1 of `input` enlarged twice by nearest neighbour:
    (B, C, H, W) -> (B, C', 2 H, 2 W).

    Each output pixel depends on only 2x2 input pixels, so the kernel elements that multiply the
    same input pixel are added first. The result is a transposed convolution of stride 2 with a 4x4
    kernel: four products per output pixel instead of nine, and no enlarged image in memory.
    """
    if input.shape[-2] * input.shape[-1] < FOLD_MIN_PIXELS:
        enlarged = F.interpolate(input, scale_factor=2, mode="nearest")
        return F.conv2d(enlarged, weight, bias, padding=1)
    # Sums of 2x2 neighbours with a border of zeros: 3x3 -> 4x4.
    folded = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)
    kernel = folded.flip(2, 3).transpose(0, 1)  # a transposed convolution mirrors its kernel
    return F.conv_transpose2d(input, kernel, bias, stride=2, padding=1)
