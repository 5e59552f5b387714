"""Products of matrices by oneDNN against torch's, and the second moments that they make."""

import pytest
import torch
from torch import Tensor

from flowdopr import cpu
from flowdopr.optim.dopr.views import add_second_moment

GRADIENT = torch.randn(24, 40)
# In blocks of 10 columns, as DoPr sees the gradient of an MLP's second layer.
BLOCKS = GRADIENT.reshape(1, 24, 4, 10).transpose(1, 2)
CASES = {
    "matrix": (GRADIENT, torch.randn(40, 40)),
    "wider": (GRADIENT, torch.randn(40, 56)),
    "transposed": (torch.randn(40, 24).mT, torch.randn(56, 40).mT),
    "parts of transposed": (torch.randn(60, 40).mT[:, 4:44], torch.randn(56, 80).mT[20:60]),
    "blocks": (BLOCKS, torch.randn(1, 4, 10, 10)),
    "halves of a stack": (torch.randn(2, 3, 8, 16), torch.randn(2, 6, 16, 16)[:, :3]),
}


@pytest.fixture(params=[True, False])
def onednn(request, monkeypatch):
    """With oneDNN for every product, and without."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(cpu, "ONEDNN_IS_FAST", request.param)
    monkeypatch.setattr(cpu, "ONEDNN_MIN_PRODUCTS", 1)
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_products_equal_torchs(case, onednn):
    a, b = CASES[case]
    found = cpu.product(a, b)
    torch.testing.assert_close(found, a @ b)
    if a.dim() == 2:
        sums = torch.randn(found.shape)
        expected = sums + 0.5 * a @ b
        cpu.add_product(sums, a, b, 0.5)
        torch.testing.assert_close(sums, expected)


@pytest.mark.parametrize("onednn", [True], indirect=True)
def test_products_of_blocks_keep_the_gradients_memory_order(onednn):
    found = cpu.product(BLOCKS, torch.randn(1, 4, 10, 10))
    assert found.transpose(1, 2).reshape(24, 40).data_ptr() == found.data_ptr()


@pytest.mark.parametrize("shape", [(300, 1, 1, 130), (300, 1, 3, 128), (40, 2, 2, 6), (9, 1, 7, 1)])
def test_second_moments_equal_their_definition(shape, onednn):
    rows = torch.randn(shape)
    sums = torch.ones(*shape[1:], shape[-1])
    add_second_moment(sums, rows, 2.0)
    expected: Tensor = 1 + 2 * torch.einsum("ngbs,ngbt->gbst", rows, rows)
    torch.testing.assert_close(sums.tril(), expected.tril(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("onednn", [True], indirect=True)
def test_bfloat16_attention_is_as_exact_as_bfloat16(onednn):
    q, k, v = (torch.randn(2, 3, 40, 16, requires_grad=True) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    wanted = torch.autograd.grad(exact.square().sum(), (q, k, v))
    rounded = cpu.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    found = torch.autograd.grad(rounded.float().square().sum(), (q, k, v))
    assert rounded.dtype == torch.bfloat16
    for ours, theirs in zip((rounded, *found), (exact, *wanted), strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_linear_under_autocast_is_no_convolution(onednn):
    x, weight = torch.randn(512, 24, requires_grad=True), torch.randn(32, 24)
    with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
        cpu.linear(x, weight)
    assert not any("conv" in event.name for event in profile.events() or [])
