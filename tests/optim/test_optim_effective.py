"""AP on the gradient of the effective weight f(W), before it is carried through f to the raw W."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from flowdopr.models import add_pc_layers, merge_pc_layers, update_spectral_norms
from flowdopr.models.layers import Conv2d, FusedLinear, Linear
from flowdopr.optim import OPTIMIZER_NAMES, DoPr, build_optimizer

X, Y = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Linear(6, 9), nn.Tanh(), Linear(9, 6)).double()


def dopr(model: nn.Module, pc_gradient: str = "effective", lr: float = 0.1, **settings) -> DoPr:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return DoPr(optimizer, model, pc_gradient=pc_gradient, **settings)


def backward(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> None:
    (model(x) - y).square().mean().backward()


def steps(model: nn.Module, optimizer: DoPr, number: int) -> list[Tensor]:
    for _ in range(number):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("pc_gradient", ["raw", "effective"])
def test_without_a_map_both_gradients_give_plain_dopr(pc_gradient):
    plain, mapped = network(), network()
    mapped[0].weight_map = nn.Identity()
    theirs, ours = dopr(plain, "raw", refresh_every=4), dopr(mapped, pc_gradient, refresh_every=4)
    steps(plain, theirs, 1)
    mapped.load_state_dict(plain.state_dict())
    ours.load_state_dict(
        copy.deepcopy(theirs.state_dict())
    )  # steps 1 to 3 take the T of step 0 in both
    for expected, found in zip(steps(plain, theirs, 3), steps(mapped, ours, 3), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def pc_network() -> nn.Sequential:
    """A Linear and a convolution under f, on the rows of X as signals."""
    torch.manual_seed(0)
    first, second = FusedLinear(6, 4, 2), Conv2d(2, 3, (1, 2))
    model = nn.Sequential(first, nn.Tanh(), nn.Unflatten(1, (2, 1, 4)), second, nn.Flatten())
    return add_pc_layers(model.append(Linear(9, 6)).double(), layers=["0", "3"])


@pytest.mark.parametrize("settings", [{}, {"rules": [{"pattern": "0", "mode": "diagonal"}]}])
def test_the_product_is_carried_through_f(settings):
    """M_W = J_f^T [G_f T], with G_f and T those of a plain layer whose weight is f(W)."""
    model, plain = pc_network(), merge_pc_layers(pc_network())
    ours, theirs = dopr(model, lr=0, **settings), dopr(plain, "raw", lr=0, **settings)
    steps(plain, theirs, 2)
    steps(model, ours, 2)  # the second one takes the T of the first
    assert [mode for _, _, mode, _ in ours.roles() if mode != "none"] == [
        mode for _, _, mode, _ in theirs.roles() if mode != "none"
    ]
    model.eval()  # where the product is not formed
    for number in (0, 3):
        layer, product = model[number], plain[number].weight.grad
        expected = torch.autograd.grad(layer.effective_weight(), layer.weight, product)[0]
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model[5].weight.grad, plain[5].weight.grad, rtol=1e-9, atol=1e-12)


class InOtherCoordinates(nn.Module):
    """f(W) A^-1 for a map f."""

    def __init__(self, f: nn.Module, a: Tensor):
        super().__init__()
        self.f, self.inverse = f, torch.linalg.inv(a)

    def forward(self, weight: Tensor) -> Tensor:
        return self.f(weight) @ self.inverse


def test_the_product_does_not_depend_on_the_coordinates_of_the_input():
    """Under z -> A z, f(W) -> f(W) A^-1 the product M becomes M A^-1, but for a scalar: T is made
    of a Sigma of unit mean eigenvalue."""
    a = torch.randn(6, 6, dtype=torch.float64) + 3 * torch.eye(6, dtype=torch.float64)
    products = []
    for coordinates in (torch.eye(6, dtype=torch.float64), a):
        model, seen = pc_network(), []
        f = model[0].weight_map
        model[0].weight_map = InOtherCoordinates(f, coordinates)
        optimizer = dopr(model, lr=0, damping=0, rules=[{"pattern": "[35]", "mode": "none"}])

        def watch(module: nn.Module, x: tuple, w: Tensor, seen: list[Tensor] = seen) -> None:
            w.register_hook(seen.append)

        f.register_forward_hook(watch)
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, X @ coordinates.mT)
            optimizer.step()
        product = seen[-1] @ coordinates.mT  # f sees M A^-T
        products.append(nn.functional.normalize((product @ coordinates).flatten(), dim=0))
    torch.testing.assert_close(*products)


@pytest.mark.parametrize("way", ["accumulated", "checkpointed", "compiled"])
def test_training_goes_on_as_without(way):
    """Three steps, with a new T in each, in half-batches, recomputed or compiled, once."""
    torch._dynamo.reset()
    counters.clear()
    found = []
    for special in (False, True):
        model = pc_network()
        optimizer = dopr(model, refresh_every=1)
        run = model
        if special and way == "checkpointed":
            run = lambda x, model=model: checkpoint(model, x, use_reentrant=False)  # noqa: E731
        elif special and way == "compiled":
            run = torch.compile(model, backend="aot_eager", fullgraph=True)
        halves = 2 if special and way == "accumulated" else 1
        for step in range(3):
            optimizer.zero_grad()
            for x, y in zip(X.chunk(halves), Y.chunk(halves), strict=True):
                ((run(x) - y).square().mean() / halves).backward()
            optimizer.step()
            update_spectral_norms(model, step)
        found.append([p.detach() for p in model.parameters()])
    assert counters["stats"].get("unique_graphs", 0) == (way == "compiled")
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_copies_evaluation_and_a_closed_optimizer_have_the_plain_gradient():
    model = pc_network()
    untouched = copy.deepcopy(model)
    optimizer = dopr(model)
    steps(model, optimizer, 1)
    untouched.load_state_dict(model.state_dict())
    backward(untouched)
    expected = untouched[0].weight.grad

    def gradient(of: nn.Module) -> Tensor:
        of.zero_grad()
        backward(of)
        return of[0].weight.grad

    assert not torch.allclose(gradient(model), expected)
    assert torch.equal(gradient(copy.deepcopy(model)), expected)
    assert torch.equal(gradient(model.eval()), expected)
    optimizer.close()
    assert torch.equal(gradient(model.train()), expected)


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (network, {}, "pc_gradient is effective, it must be raw without PC layers"),
        (pc_network, {"form": "sandwich"}, "must be raw with form 'sandwich'"),
        (pc_network, {"pc_gradient": "both"}, "pc_gradient is both, it must be raw or effective"),
    ],
)
def test_what_cannot_be_is_refused(model, settings, words):
    with pytest.raises(ValueError, match=words):
        dopr(model(), **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_every_optimizer_trains_pc_layers(name, dtype):
    model = pc_network().to(dtype)
    options = {"class_path": "torch.optim.RAdam"} if name == "outside" else {}
    optimizer = build_optimizer(model, name, 1e-2, **options)
    if name != "kfac":
        optimizer = DoPr(optimizer, model, pc_gradient="effective", refresh_every=2)
    x, y, losses = X.to(dtype), Y.to(dtype), []
    for step in range(12):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        update_spectral_norms(model, step)
        losses.append(loss.item())
    assert min(losses[-3:]) < losses[0]
    norms = torch.linalg.matrix_norm(model[0].weight.float().view(2, 4, 6), 2)
    u, v = model[0].weight_map.u.float(), model[0].weight_map.v.float()
    found = torch.einsum("kr,krc,kc->k", u, model[0].weight.float().view(2, 4, 6), v)
    torch.testing.assert_close(found, norms, rtol=0.03, atol=0)
