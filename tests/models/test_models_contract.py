"""What every model keeps, whatever its options."""

import copy

import pytest
import torch
from torch import nn
from variants import SHAPE, VARIANTS, make

from flowdopr.models.layers import EffectiveWeight, FusedLinear
from flowdopr.optim import DoPr, parameter_roles

ALL = pytest.mark.parametrize("name", VARIANTS)


def inputs(batch=4, shape=SHAPE, num_classes=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *shape, generator=generator)
    t = torch.rand(batch, generator=generator)
    y = torch.randint(num_classes + 1, (batch,), generator=generator)
    return x, t, y


def perturbed(model: nn.Module) -> nn.Module:
    """The model away from its zero initialisation, where every parameter matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@ALL
def test_output_is_zero_at_the_start_and_contiguous(name):
    model = make(name)
    out = model(*inputs())
    assert model.image_shape == SHAPE
    assert model.num_classes == 5
    assert out.shape == (4, *SHAPE)
    assert out.is_contiguous()
    assert torch.equal(out, torch.zeros_like(out))


@ALL
@pytest.mark.parametrize("num_classes", [0, 5])
def test_gradient_reaches_every_parameter(name, num_classes):
    model = perturbed(make(name, num_classes))
    x, t, y = inputs()
    model(x, t, y).square().sum().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@ALL
def test_no_label_is_the_null_label_and_labels_matter(name):
    model = perturbed(make(name)).eval()
    x, t, y = inputs()
    null = torch.full_like(y, 5)
    assert torch.equal(model(x, t), model(x, t, null))
    assert not torch.allclose(model(x, t, torch.zeros_like(y)), model(x, t, null))


@ALL
def test_unconditional_model_ignores_labels(name):
    model = perturbed(make(name, num_classes=0)).eval()
    x, t, y = inputs()
    assert torch.equal(model(x, t), model(x, t, y))
    assert not any(isinstance(module, nn.Embedding) for module in model.modules())


@ALL
def test_images_of_a_batch_do_not_see_one_another(name):
    model = perturbed(make(name)).double().eval()
    x, t, y = inputs()
    x, t = x.double(), t.double()
    together = model(x, t, y)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, together)


@ALL
def test_float32_agrees_with_float64(name):
    model = perturbed(make(name)).eval()
    x, t, y = inputs()
    single = model(x, t, y)
    exact = model.double()(x.double(), t.double(), y)
    torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=1e-3)


@ALL
def test_bf16_autocast_trains(name):
    model = perturbed(make(name)).eval()
    x, t, y = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
        out.float().square().mean().backward()
    exact = model(x, t, y)
    error = (out.float() - exact).norm() / exact.norm()
    assert error < 0.05
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())


@ALL
def test_state_dict_round_trip(name):
    model, other = perturbed(make(name)).eval(), make(name).eval()
    assert {key for key, _ in model.named_parameters()} == set(model.state_dict())
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(*inputs()), other(*inputs()))


@ALL
def test_every_matrix_belongs_to_a_layer_that_optimizers_know(name):
    model = make(name)
    owned = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            owned |= {id(p) for p in module.parameters(recurse=False)}
        if isinstance(module, FusedLinear):
            assert module.weight.shape[0] % module.fused_blocks == 0
    assert all(p.ndim == 1 for p in model.parameters() if id(p) not in owned)


@ALL
def test_layer_hooks_see_every_weight_run(name):
    model, seen = perturbed(make(name)), set()
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            module.register_forward_pre_hook(lambda _, args, key=key: seen.add(key))
    model(*inputs())
    expected = {key.rpartition(".")[0] for key, p in model.named_parameters() if p.ndim > 1}
    assert expected <= seen


@ALL
def test_a_map_on_the_effective_weight_reaches_every_layer_and_leaves_the_raw_weight(
    name, monkeypatch
):
    model = perturbed(make(name)).eval()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert all(isinstance(layer, EffectiveWeight) for layer in layers)
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        for layer in doubled.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.weight.mul_(2)
    expected, plain = doubled(*inputs()), model(*inputs())
    monkeypatch.setattr(EffectiveWeight, "effective_weight", lambda self: 2 * self.weight)
    assert not torch.allclose(model(*inputs()), plain)
    torch.testing.assert_close(model(*inputs()), expected, rtol=1e-4, atol=1e-4)
    roles = {role.name: role for role in parameter_roles(model)}
    for key, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            role = roles[f"{key}.weight"]
            assert role.parameter is layer.weight
            assert role.kind == ("conv" if isinstance(layer, nn.Conv2d) else "matrix")


@pytest.mark.parametrize("name", ["dit", "unet"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 16, 32), (4, 64, 64)])
def test_image_shapes(name, shape):
    options = {"unet": {"attention_resolutions": ()}, "dit": {}}[name]
    model_class, _ = VARIANTS[name]
    small = {"dit": {"size": "XXS", "depth": 1}, "unet": {"channels": 8, "num_res_blocks": 1}}[name]
    if name == "unet":
        small["channel_multipliers"] = (1, 2, 2)
    model = perturbed(model_class(shape, 0, **small, **options)).double().eval()
    x, t, _ = inputs(2, shape)
    assert model(x.double(), t.double()).shape == (2, *shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit-modern", "unet"])
def test_compiles_in_one_graph(name):
    model = perturbed(make(name)).eval()
    expected = model(*inputs())
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs()), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_cuda_agrees_with_cpu(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = perturbed(make(name)).double().eval()
    x, t, y = inputs()
    expected = model(x.double(), t.double(), y)
    out = model.cuda()(x.double().cuda(), t.double().cuda(), y.cuda())
    torch.testing.assert_close(out.cpu(), expected)


@ALL
def test_dopr_leaves_what_reads_one_row_per_image_to_the_gp_unless_a_rule_says_otherwise(name):
    model, rows = make(name), {}
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            module.register_forward_pre_hook(
                lambda module, args, key=key: rows.update({key: args[0].ndim < 3})
            )
    model(*inputs())
    for rules in ([], [{"pattern": "condition|modulation"}]):
        optimizer = DoPr(torch.optim.SGD(model.parameters(), lr=0.1), model, rules=rules)
        left = {
            key.removesuffix(".weight")
            for key, _, _, reason in optimizer.roles()
            if "left_to_gp" in reason
        }
        assert left == (set() if rules else {key for key, one in rows.items() if one})
        optimizer.close()
