"""What goes wrong and how DoPr says so."""

import logging
from collections.abc import Callable

import pytest
import torch
from layer_cases import adamw, small_model
from torch import Tensor, nn
from torch.optim import LBFGS

from flowdopr.optim import KFAC, build_optimizer
from flowdopr.optim.dopr import DoPr, LayerRule

BAD: list[tuple[str, Callable[[nn.Module], DoPr]]] = [
    ("damping is -1", lambda m: adamw(m, damping=-1)),
    ("cov_decay is 1", lambda m: adamw(m, cov_decay=1.0)),
    ("refresh_every is 0", lambda m: adamw(m, refresh_every=0)),
    ("max_rows is 0", lambda m: adamw(m, max_rows=0)),
    ("max_rows is many, it must be 1 or more, or 'all'", lambda m: adamw(m, max_rows="many")),
    (
        "layer rule '3': max_rows has no effect with mode 'none'; leave it out",
        lambda m: adamw(m, rules=[LayerRule("3", "none", max_rows=5)]),
    ),
    ("layer rule '3': max_rows is -1", lambda m: adamw(m, rules=[LayerRule("3", max_rows=-1)])),
    ("decides no layer", lambda m: adamw(m, rules=[LayerRule("attention")])),
    ("not in the optimizer", lambda m: DoPr(torch.optim.SGD(m[0].parameters()), m)),
    ("refresh_every is 1.5, it must be a whole number", lambda m: adamw(m, refresh_every=1.5)),
    ("max_side is 0", lambda m: adamw(m, max_side=0)),
    ("'3': max_side is 0", lambda m: adamw(m, rules=[LayerRule("3", max_side=0)])),
    ("damping is inf", lambda m: adamw(m, damping=float("inf"))),
    ("layer rule '\\(': not a regular expression", lambda m: adamw(m, rules=[LayerRule("(")])),
    ("has no field 'mod'", lambda m: adamw(m, rules=[{"pattern": "3", "mod": "full"}])),
    ("a layer rule needs a pattern", lambda m: adamw(m, rules=[{"mode": "full"}])),
    ("is a KFAC, which preconditions by layer inputs already", lambda m: DoPr(KFAC(m), m)),
    ("LBFGS evaluates the loss itself within a step", lambda m: DoPr(LBFGS(m.parameters()), m)),
    (
        "Adafactor reads them: use form 'inverse'",
        lambda m: DoPr(torch.optim.Adafactor(m.parameters()), m, form="sandwich"),
    ),
    ("damping is \\(0.1, 0.2\\), it must be a number or", lambda m: adamw(m, damping=(0.1, 0.2))),
    ("damping is 0.1, it must be a number or", lambda m: adamw(m, damping="0.1")),
    ("cov_decay is a, it must be", lambda m: adamw(m, cov_decay="a")),
    ("power is None, it must be", lambda m: adamw(m, power=None)),
    ("power is inf, it must be", lambda m: adamw(m, power=float("inf"))),
    ("a list of layer rules", lambda m: adamw(m, rules=LayerRule(""))),
    ("no effect with mode 'full'", lambda m: adamw(m, rules=[LayerRule("", "full", max_side=3)])),
    ("wraps a torch optimizer, got Sequential", lambda m: DoPr(m, adamw(m))),
    ("is a DoPr, which preconditions", lambda m: DoPr(adamw(m), m)),
    (
        "has no field 'mod'",
        lambda m: build_optimizer(m, "sgd", 1, dopr={"rules": [{"pattern": "", "mod": 1}]}),
    ),
    ("layer '5' has no weight yet", lambda m: DoPr(adamw(m).optimizer, m.append(nn.LazyLinear(2)))),
    ("no trainable layer", lambda m: adamw(m, rules=[LayerRule("", mode="none")])),
]


@pytest.mark.parametrize(("message", "build"), BAD, ids=[message for message, _ in BAD])
def test_bad_settings_are_one_clear_line(message: str, build: Callable[[nn.Module], DoPr]) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build(small_model())
    assert "\n" not in str(error.value)


def test_a_weight_used_without_its_module_is_reported_once(caplog) -> None:
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer)
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        for _ in range(3):
            nn.functional.linear(torch.ones(4, 3), layer.weight).sum().backward()
            optimizer.step()
    assert caplog.text.count("no refresh has seen finite inputs") == 1


def test_a_layer_that_was_frozen_at_the_start_is_reported_when_it_trains(caplog) -> None:
    model = small_model()
    model[3].weight.requires_grad_(False)
    optimizer = adamw(model, refresh_every=1)
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        for thawed in (False, True, True):
            model[3].weight.requires_grad_(thawed)
            model(torch.randn(6, 2, 4, 4)).sum().backward()
            optimizer.step()
            assert caplog.text.count("layer 3: frozen when DoPr was built") == int(thawed)


def test_rules_may_be_mappings() -> None:
    model = small_model()
    optimizer = adamw(model, rules=[{"pattern": "^4$", "mode": "diagonal"}])
    assert optimizer.roles()[4][2] == "diagonal"


@pytest.mark.filterwarnings("ignore:Please use the new API settings")  # torch 2.9, once
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_programs_matmul_precision_is_given_back(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer)
    layer(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    after = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    assert after == precision


@pytest.mark.filterwarnings("ignore:Please use the new API settings")  # torch 2.9, once
@pytest.mark.parametrize("form", ["inverse", "sandwich"])
def test_sigma_is_factored_in_full_precision_and_t_applied_in_the_programs(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noting(name: str, function: Callable) -> Callable:
        def noted(*args: object) -> object:
            seen.append((name, torch.backends.cuda.matmul.fp32_precision))
            return function(*args)

        return noted

    layer = nn.Linear(3, 2)
    optimizer = adamw(layer, form=form)
    case = optimizer.statistics.moments[0].view
    monkeypatch.setattr(case, "multiply", noting("apply", case.multiply))
    factor = noting("factor", torch.linalg.cholesky_ex)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", factor)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        layer(torch.ones(4, 3)).sum().backward()
        optimizer.step()
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen[:2] == [("factor", "ieee"), ("apply", "tf32")]
    assert seen[2:] == [("apply", "tf32")] * (form == "sandwich")


@pytest.mark.parametrize("build", [adamw, KFAC], ids=["dopr", "kfac"])
def test_transforms_of_torch_func_and_batched_gradients_pass_by(build) -> None:
    model = small_model()
    optimizer = build(model, refresh_every=1)

    def counted() -> list[int]:
        return [s.unused.rows + s.used.rows for s in optimizer.statistics.moments]

    x = torch.randn(5, 6, 2, 4, 4)
    expected = torch.stack([model(part) for part in x])
    before = counted()
    torch.testing.assert_close(torch.vmap(model)(x), expected)
    weights = dict(model.named_parameters())

    def loss(w: dict[str, Tensor], part: Tensor) -> Tensor:
        return torch.func.functional_call(model, w, (part,)).sum()

    torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    assert counted() == before
    y = model(x[0])
    before = counted()
    seeds = torch.eye(18).view(18, 6, 3)
    torch.autograd.grad(y, [model[0].weight], seeds, is_grads_batched=True)
    assert counted() == before


def test_a_closed_dopr_steps_no_more() -> None:
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer)
    optimizer.close()
    layer(torch.ones(4, 3)).sum().backward()
    with pytest.raises(ValueError, match="was closed"):
        optimizer.step()


def test_parameters_of_no_layer_that_the_optimizer_lacks_are_logged(caplog) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        DoPr(torch.optim.SGD(model[0].parameters()), model)
    assert "2 trainable parameters, 1.weight first, are not in the optimizer" in caplog.text


@pytest.mark.parametrize("x", [torch.ones(4, 3).to_sparse(), [torch.ones(4, 3)]])
def test_inputs_without_rows_pass_by_and_are_reported(x: object, caplog) -> None:
    class Summed(nn.Linear):
        def forward(self, x: object) -> Tensor:
            return super().forward(x[0] if isinstance(x, list) else x.to_dense())

    layer = Summed(3, 2)
    optimizer = adamw(layer)
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        layer(x).sum().backward()
        optimizer.step()
    assert "no refresh has seen finite inputs" in caplog.text


def test_a_flattened_weight_is_left_to_the_gp() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
    model[1].weight = nn.Parameter(torch.ones(6))
    optimizer = DoPr(torch.optim.SGD(model.parameters()), model)
    assert optimizer.roles()[2][2] == "none"
    assert "FSDP1" in optimizer.roles()[2][3]


def test_roles_tell_the_blocks_of_shared_offsets() -> None:
    layer = nn.Conv2d(8, 4, 3)
    for mode in ("sua", "sua-mean", "blocks"):
        optimizer = adamw(layer, rules=[LayerRule("", mode, max_side=4)])
        assert optimizer.roles()[0][2] == f"{mode} {18 if mode == 'blocks' else 2}x4"


def test_complex_weights_are_left_to_the_gp() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2, dtype=torch.complex64))
    optimizer = DoPr(torch.optim.SGD(model.parameters()), model)
    assert optimizer.roles()[2][2:] == ("none", "complex")
