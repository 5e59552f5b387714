"""Every layer case against the dense reference: z, the gradient's view, M, and one whole step."""

import pytest
import reference
import torch
from layer_cases import CASES, IDS, LayerCase
from torch import Tensor, nn

from flowdopr.optim.dopr import DoPr


def backward(module: nn.Module, x: Tensor) -> Tensor:
    """Run a random linear loss; returns the gradient of the output."""
    y = module(x)
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    y.backward(delta)
    return delta


def transposed_output_gradient(module: nn.ConvTranspose2d, delta: Tensor) -> Tensor:
    """Each pixel's window of the output gradient, as channels: (B, G * C_out / G * k * k, H, W)."""
    height, width = module.kernel_size
    windows = delta.unfold(2, height, module.stride[0]).unfold(3, width, module.stride[1])
    return windows.permute(0, 1, 4, 5, 2, 3).flatten(1, 3)


def wrap(module: nn.Module, lr: float = 1.0, **settings: object) -> DoPr:
    exact = {"max_rows": "all", "cov_decay": 0.0, **settings}
    return DoPr(torch.optim.SGD(module.parameters(), lr=lr), module, **exact)


def expected_update(module: nn.Module, x: Tensor, damping: float, **kwargs: object) -> Tensor:
    """M by the reference, one matrix for each group, on top of each other."""
    rows = reference.layer_rows(module, x)
    matrices = reference.layer_matrices(module, module.weight.grad)
    parts = [
        reference.precondition(g, reference.second_moment(z), damping, **kwargs)
        for g, z in zip(matrices, rows, strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_one_step_is_the_reference_update(case: LayerCase) -> None:
    module, x = case.make()
    optimizer = wrap(module, damping=0.1)
    before = module.weight.detach().clone()
    backward(module, x)
    expected = expected_update(module, x, 0.1)
    optimizer.step()
    moved = torch.cat(reference.layer_matrices(module, before - module.weight.detach()))
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_rows_and_output_gradients_make_the_weight_gradient(case: LayerCase) -> None:
    module, x = case.make()
    delta = backward(module, x)
    if isinstance(module, nn.ConvTranspose2d):
        delta = transposed_output_gradient(module, delta)
    channels_last = delta.movedim(1, -1) if delta.dim() == 4 else delta
    flat = channels_last.reshape(-1, channels_last.shape[-1])
    rows = reference.layer_rows(module, x)
    for z, d, g in zip(
        rows,
        flat.chunk(len(rows), dim=1),
        reference.layer_matrices(module, module.weight.grad),
        strict=False,
    ):
        torch.testing.assert_close(d.T @ z, g, rtol=1e-10, atol=1e-12)


def test_a_1x1_convolution_is_a_linear() -> None:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(4, 3, 1).double(), nn.Linear(4, 3).double()
    with torch.no_grad():
        linear.weight.copy_(conv.weight[:, :, 0, 0])
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    optimizers = [wrap(conv), wrap(linear)]
    conv(x).square().sum().backward()
    y = nn.functional.linear(x.movedim(1, -1), linear.weight, conv.bias.detach())
    linear(x.movedim(1, -1)).backward(2 * y.detach())
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(conv.weight[:, :, 0, 0], linear.weight, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_micro_batches_pool_exactly(case: LayerCase) -> None:
    weights = []
    for cuts in ([], [1], [1, 2]):
        module, x = case.make()
        optimizer = wrap(module, damping=0.01)
        for part in torch.tensor_split(x, cuts):
            module(part).square().sum().backward()
        optimizer.step()
        weights.append(module.weight.detach())
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_any_linear_map_of_the_input_leaves_the_outputs_trajectory(
    momentum: float, weight_decay: float
) -> None:
    torch.manual_seed(0)
    change = torch.randn(5, 5, dtype=torch.float64) + 2 * torch.eye(5, dtype=torch.float64)
    z = torch.randn(30, 5, dtype=torch.float64)
    start = torch.randn(3, 5, dtype=torch.float64)
    outputs = []
    for matrix in (torch.eye(5, dtype=torch.float64), change):
        layer = nn.Linear(5, 3, bias=False).double()
        with torch.no_grad():
            layer.weight.copy_(start @ torch.linalg.inv(matrix))
        mean = (z @ matrix.T).square().mean().item()  # tr(Sigma) / d, by which DoPr divides Sigma
        gp = torch.optim.SGD(layer.parameters(), lr=0.1 / mean, momentum=momentum)
        optimizer = DoPr(gp, layer, damping=0.0, cov_decay=0.0, refresh_every=1)
        for _ in range(5):
            optimizer.zero_grad()
            y = layer(z @ matrix.T)
            (y.sin().sum() + y.square().mean()).backward()
            optimizer.step()
            with torch.no_grad():
                layer.weight.mul_(1 - 0.1 * weight_decay)
        outputs.append(layer(z @ matrix.T).detach())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("damping", [1e-3, 0.1])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_cholesky_dual_form_and_dense_inverse_agree(
    damping: float, dtype: torch.dtype, rtol: float
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 3, bias=False).to(dtype)
    z = torch.randn(7, 24).to(dtype)  # fewer samples than coordinates
    before = layer.weight.detach().clone()
    optimizer = wrap(layer, damping=damping)
    y = layer(z)
    y.retain_grad()
    y.sin().sum().backward()
    grad = layer.weight.grad.clone()
    optimizer.step()
    dense = reference.precondition(grad, reference.second_moment(z), damping)
    dual = reference.precondition_dual(y.grad, z, damping) * (
        (1 + damping) * z.double().square().mean()
    )
    update = (before - layer.weight.detach()).double()
    scale = dense.abs().max().item()
    torch.testing.assert_close(dual, dense, rtol=rtol, atol=rtol * scale)
    torch.testing.assert_close(update, dense, rtol=rtol, atol=rtol * scale)
