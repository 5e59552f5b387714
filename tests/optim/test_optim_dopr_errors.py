"""What goes wrong and how DoPr says so."""

import logging
from collections.abc import Callable

import pytest
import torch
from layer_cases import adamw, small_model
from torch import Tensor, nn
from torch.optim import LBFGS

from flowdopr.optim import build_optimizer, reference
from flowdopr.optim.dopr import DoPr
from flowdopr.optim.kfac import KFAC
from flowdopr.optim.plan import LayerRule

BAD: list[tuple[str, Callable[[nn.Module], DoPr]]] = [
    ("damping is -1", lambda m: adamw(m, damping=-1)),
    ("cov_decay is 1", lambda m: adamw(m, cov_decay=1.0)),
    ("refresh_every is 0", lambda m: adamw(m, refresh_every=0)),
    ("max_rows is 0", lambda m: adamw(m, max_rows=0)),
    ("max_rows is many, it must be 1 or more, or 'all'", lambda m: adamw(m, max_rows="many")),
    ("max_rows is -1", lambda m: adamw(m, rules=[LayerRule("3", max_rows=-1)])),
    ("decides no layer", lambda m: adamw(m, rules=[LayerRule("attention")])),
    ("not in the optimizer", lambda m: DoPr(torch.optim.SGD(m[0].parameters()), m)),
    ("refresh_every is 1.5, it must be a whole number", lambda m: adamw(m, refresh_every=1.5)),
    ("max_side is 0", lambda m: adamw(m, max_side=0)),
    ("max_side of a rule is 0", lambda m: adamw(m, rules=[LayerRule("3", max_side=0)])),
    ("max_nonfinite is -1", lambda m: adamw(m, max_nonfinite=-1)),
    ("damping is inf", lambda m: adamw(m, damping=float("inf"))),
    ("layer rule '\\(': not a regular expression", lambda m: adamw(m, rules=[LayerRule("(")])),
    ("has no field 'mod'", lambda m: adamw(m, rules=[{"pattern": "3", "mod": "full"}])),
    ("a layer rule needs a pattern", lambda m: adamw(m, rules=[{"mode": "full"}])),
    ("KFAC preconditions by layer inputs itself", lambda m: DoPr(KFAC(m), m)),
    ("LBFGS evaluates the loss itself within a step", lambda m: DoPr(LBFGS(m.parameters()), m)),
    (
        "Adafactor reads them: use form 'inverse'",
        lambda m: DoPr(torch.optim.Adafactor(m.parameters()), m, form="sandwich"),
    ),
    ("damping is \\(0.1, 0.2\\), it must be a number or", lambda m: adamw(m, damping=(0.1, 0.2))),
    ("damping is 0.1, it must be a number or", lambda m: adamw(m, damping="0.1")),
    ("cov_decay is a, it must be", lambda m: adamw(m, cov_decay="a")),
    ("anneal is 5, it must be", lambda m: adamw(m, anneal=5)),
    ("anneal is \\(1,\\), it must be", lambda m: adamw(m, anneal=(1,))),
    ("power is None, it must be", lambda m: adamw(m, power=None)),
    ("power is inf, it must be", lambda m: adamw(m, power=float("inf"))),
    ("a list of layer rules", lambda m: adamw(m, rules=LayerRule(""))),
    ("null with mode 'full'", lambda m: adamw(m, rules=[LayerRule("", "full", max_side=3)])),
    ("wraps a torch optimizer, got Sequential", lambda m: DoPr(m, adamw(m))),
    ("is a DoPr already", lambda m: DoPr(adamw(m), m)),
    (
        "has no field 'mod'",
        lambda m: build_optimizer(m, "dopr-sgd", 1, rules=[{"pattern": "", "mod": 1}]),
    ),
    ("layer '5' has no weight yet", lambda m: DoPr(adamw(m).optimizer, m.append(nn.LazyLinear(2)))),
    ("no trainable layer", lambda m: adamw(m, rules=[LayerRule("", mode="none")])),
]


@pytest.mark.parametrize(("message", "build"), BAD, ids=[message for message, _ in BAD])
def test_bad_settings_are_one_clear_line(message: str, build: Callable[[nn.Module], DoPr]) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build(small_model())
    assert "\n" not in str(error.value)


def test_nonfinite_activations_are_skipped_counted_and_end_in_a_stop(caplog) -> None:
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer, refresh_every=1, max_nonfinite=3)
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        for poison in (0.0, float("nan"), float("inf"), float("nan")):
            layer(torch.randn(4, 3) + poison).square().sum().backward()
            layer.zero_grad()
            optimizer.step()
        numbers = optimizer.preconditioner.records()[""]
        assert (numbers.skipped, numbers.in_a_row, numbers.refreshes) == (3, 3, 1)
        assert caplog.text.count("not finite, refresh skipped") == 2  # the third is told next
        assert torch.isfinite(optimizer.statistics.all[0].transform).all()
        layer(torch.ones(4, 3)).sum().backward()
        with pytest.raises(FloatingPointError, match="3 refreshes in a row"):
            optimizer.step()
        assert caplog.text.count("not finite, refresh skipped") == 3


@pytest.mark.parametrize("last_words", [DoPr.close, DoPr.state_dict])
def test_what_the_last_refresh_has_to_report_is_not_lost(last_words, caplog) -> None:
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer, max_nonfinite=1)
    layer(torch.full((4, 3), torch.nan)).sum().backward()
    optimizer.step()
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        last_words(optimizer)
        last_words(optimizer)
    assert caplog.text.count("not finite, refresh skipped") == 1


def poisoned_steps(optimizer: DoPr, layer: nn.Module, steps: int, after_step=None) -> int:
    """Steps on NaN until one raises; returns how many did not."""
    for step in range(steps):
        layer(torch.full((4, 3), torch.nan)).sum().backward()
        try:
            optimizer.step()
        except FloatingPointError:
            return step
        if after_step is not None:
            after_step()
    return steps


def test_saving_does_not_lose_the_stop() -> None:
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer, max_nonfinite=2, refresh_every=1)
    assert poisoned_steps(optimizer, layer, 9, optimizer.state_dict) == 2


def test_the_stop_comes_though_ap_has_faded_meanwhile() -> None:
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer, max_nonfinite=2, refresh_every=2, anneal=(1, 3))
    assert poisoned_steps(optimizer, layer, 9) == 3


def test_the_stop_comes_once_for_a_layer_that_runs_no_more() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = adamw(nn.ModuleList([first, second]), max_nonfinite=1, refresh_every=1)
    stops = []
    for step in range(5):
        optimizer.zero_grad()
        loss = first(torch.randn(4, 3)).sum()
        if step == 0:
            loss = loss + second(torch.full((4, 3), torch.nan)).sum()
        loss.backward()
        try:
            optimizer.step()
        except FloatingPointError:
            stops.append(step)
    assert stops == [1]


def test_a_parted_twin_inherits_no_report(caplog) -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = adamw(nn.ModuleDict({"first": first, "second": second}), refresh_every=1)
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        for step in range(6):
            optimizer.zero_grad()
            x = torch.randn(4, 3) + (torch.nan if step == 1 else 0)
            (first(x) + second(x.clone() if step > 2 else x)).sum().backward()
            optimizer.step()
    assert optimizer.statistics.all[1].twin is None
    assert caplog.text.count("refresh skipped") == caplog.text.count("layer first:") == 1


@pytest.mark.parametrize("poison", ["first", "later"])
def test_a_layer_that_saw_no_finite_inputs_takes_the_bare_step(poison: str) -> None:
    """Before the first good refresh AP is the identity; after it T stays what it was."""
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer, refresh_every=1)
    if poison == "later":
        layer(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    kept = optimizer.statistics.all[0].transform
    optimizer.zero_grad()
    layer(torch.full((4, 3), torch.inf)).sum().backward()
    grad = torch.randn(2, 3)
    layer.weight.grad, layer.bias.grad = grad.clone(), torch.zeros(2)
    optimizer.step()
    expected = grad if kept is None else grad @ kept[0, 0]
    torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("form", ["inverse", "sandwich"])
def test_a_failing_factorisation_takes_the_diagonal_then_a_raised_damping(form, caplog) -> None:
    """Three rows in 40 coordinates, and no damping: Sigma is singular."""
    torch.manual_seed(0)
    layer, z = nn.Linear(40, 2, bias=False), torch.randn(3, 40)
    optimizer = adamw(layer, damping=0.0, form=form, cov_decay=0.0, refresh_every=1)
    sigma = reference.second_moment(z)
    mean = sigma.diagonal().mean()
    seen = []
    with caplog.at_level(logging.WARNING, "flowdopr.optim"):
        for _ in range(8):
            optimizer.zero_grad()
            layer(z).square().sum().backward()
            optimizer.step()
            seen.append((optimizer.preconditioner.records()[""].damping, transform_of(optimizer)))
    (first, diagonal), (last, full) = seen[0], seen[-1]
    root = 0.5 if form == "sandwich" else 1.0
    torch.testing.assert_close(diagonal, (sigma.diagonal() / mean).pow(-root).diag().float())
    assert first == 0 < last < 1e-3
    damped = (sigma / mean + last * torch.eye(40)).double()
    inverse = (full @ full.mT if form == "sandwich" else full).double()
    torch.testing.assert_close(inverse @ damped, torch.eye(40).double(), rtol=0, atol=0.2)
    assert "damping raised to 1.2e-06" in caplog.text
    assert torch.isfinite(layer.weight).all()


def transform_of(optimizer: DoPr) -> Tensor:
    """T of the first layer, (s, s)."""
    return optimizer.statistics.all[0].transform[0, 0].clone()


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
    case = optimizer.statistics.all[0].case
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


def test_transforms_of_torch_func_pass_by() -> None:
    model = small_model()
    optimizer = adamw(model, refresh_every=1)
    x = torch.randn(5, 6, 2, 4, 4)
    torch.testing.assert_close(torch.vmap(model)(x), torch.stack([model(part) for part in x]))
    assert [s.fresh.count for s in optimizer.statistics.all[1:]] == [30, 30]
    weights = dict(model.named_parameters())
    torch.func.grad(lambda w: torch.func.functional_call(model, w, (x[0],)).sum())(weights)
    assert [s.fresh.count for s in optimizer.statistics.all[1:]] == [30, 30]


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
