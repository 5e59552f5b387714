"""Matrix products of many rows, by the library that is fastest at them."""

import torch
import torch.nn.functional as F
from torch import Tensor

# With AVX-512, oneDNN's 1x1 convolution runs float32 at full width on every x86 CPU. MKL, which is
# behind F.linear, uses half of it on other makers' CPUs than its own: half the speed of a DiT.
ONEDNN_IS_FAST = (
    torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
)
# torch gives 1x1 convolutions of fewer images to a slower kernel; fewer rows are faster in MKL.
ONEDNN_IMAGES, ONEDNN_MIN_ROWS = 16, 512


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, input (..., d_in) and weight (d_out, d_in) -> (..., d_out), computed by oneDNN
    where that is faster."""
    rows = input.shape[:-1].numel()
    suits = ONEDNN_IS_FAST and input.is_cpu and input.dtype == torch.float32
    if not suits or rows < ONEDNN_MIN_ROWS or rows % ONEDNN_IMAGES:
        return F.linear(input, weight, bias)
    # Rows become the pixels of channels-last images one pixel high: views, no copies.
    pixels = input.reshape(ONEDNN_IMAGES, -1, input.shape[-1]).mT.unsqueeze(2)
    out = F.conv2d(pixels, weight[:, :, None, None], bias)
    return out.squeeze(2).mT.reshape(*input.shape[:-1], weight.shape[0])
