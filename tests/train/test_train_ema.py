"""Weight averages against their definitions, and lengths reconstructed after training."""

import doctest

import numpy as np
import pytest
import torch
from tiny import again, tiny, weights

from flowdopr.config import ConfigError
from flowdopr.runs.averages import Average, combine, gamma_of, posthoc_coefficients
from flowdopr.runs.folder import RunFolder
from flowdopr.train import EMA, ema, train


def test_the_examples_run():
    found = doctest.testmod(ema)
    assert found.attempted
    assert not found.failed


def random_walk(steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(steps, 7, generator=generator, dtype=torch.float64).cumsum(0)


def run_averages(path: torch.Tensor, averages, snapshots=()):
    """The averages after the last row of `path`, and copies of them after the steps asked for."""
    model = torch.nn.Linear(7, 1, bias=False).double()
    ema, copies = EMA(model, averages), {}
    for step, row in enumerate(path, start=1):
        with torch.no_grad():
            model.weight.copy_(row)
        ema.update(step)
        if step in snapshots:
            copies |= {(step, n): {"w": v["weight"].clone()} for n, v in ema.values.items()}
    return {name: value["weight"][0] for name, value in ema.values.items()}, copies


def test_exponential_average_equals_its_definition():
    path = random_walk(30)
    start = torch.nn.Linear(7, 1, bias=False).double()
    ema = EMA(start, [Average(decay=0.6)])
    expected = start.weight.detach()[0].clone()
    for step, row in enumerate(path, start=1):
        with torch.no_grad():
            start.weight.copy_(row)
        ema.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * row
    torch.testing.assert_close(ema.values["ema-0.6"]["weight"][0], expected)


@pytest.mark.parametrize("length", [0.02, 0.1, 0.25])
def test_power_function_average_has_its_profile(length):
    gamma = gamma_of(length)
    sigma = (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5
    assert sigma == pytest.approx(length)
    steps = 200
    path = random_walk(steps)
    found, _ = run_averages(path, [Average(length=length)])
    tau = torch.arange(steps + 1, dtype=torch.float64)
    share = (tau / steps) ** (gamma + 1)  # cumulative weight of the steps up to tau, equation (2)
    expected = (share.diff()[:, None] * path).sum(0)
    torch.testing.assert_close(found[f"power-{length:g}"], expected)


def test_other_lengths_are_reconstructed():
    """As EDM2 finds: from two lengths and a few snapshots, other lengths come out to about 1 %."""
    steps, stored = 4000, (0.05, 0.10)
    path = random_walk(steps)
    snapshots = range(250, steps + 1, 250)
    wanted = [Average(length=length) for length in (0.06, 0.08, 0.13)]
    kept = [Average(length=length) for length in stored]
    truth, copies = run_averages(path, [*kept, *wanted], snapshots)
    keys = [(step, length) for step in snapshots for length in stored]
    for average, length in zip(wanted, (0.06, 0.08, 0.13), strict=True):
        coefficients = posthoc_coefficients(keys, steps, length)
        assert coefficients.sum() == pytest.approx(1, abs=1e-9)
        parts = (copies[step, f"power-{sigma:g}"] for step, sigma in keys)
        made = combine(parts, coefficients.tolist())["w"][0]
        scale = (path[-1] - path.mean(0)).norm()
        assert (made - truth[average.name]).norm() < 0.02 * scale


def test_a_stored_length_is_its_own_reconstruction():
    keys = [(step, length) for step in (10, 20, 30) for length in (0.05, 0.1)]
    coefficients = posthoc_coefficients(keys, 30, 0.1)
    np.testing.assert_allclose(coefficients, [0, 0, 0, 0, 0, 1], atol=1e-6)


def test_few_averages_keep_the_weights_scale_or_are_refused():
    keys = [(200, 0.05), (200, 0.1)]
    for length in (0.06, 0.25):  # the free least squares give 0.25 coefficients with sum 0.5
        coefficients = posthoc_coefficients(keys, 200, length, max_error=np.inf)
        assert coefficients.sum() == pytest.approx(1, abs=1e-9)
    posthoc_coefficients(keys, 200, 0.06)
    with pytest.raises(ValueError, match=r"2 stored .* error of 1, more than 0\.1: choose"):
        posthoc_coefficients(keys, 200, 0.25)
    with pytest.raises(ValueError, match=r"1 stored average up to step 200"):
        posthoc_coefficients(keys[:1], 200, 0.1)


def test_the_reported_error_is_the_profiles():
    step, length, keys = 400, 0.15, [(t, sigma) for t in (200, 400) for sigma in (0.05, 0.1)]
    coefficients = posthoc_coefficients(keys, step, length, max_error=np.inf)
    tau = (np.arange(40_000) + 0.5) * step / 40_000

    def profile(end, sigma):
        gamma = gamma_of(sigma)
        return np.where(tau < end, (gamma + 1) * (tau / end) ** gamma / end, 0.0)

    made = sum(c * profile(*key) for c, key in zip(coefficients, keys, strict=True))
    wanted = profile(step, length)
    error = float(np.linalg.norm(made - wanted) / np.linalg.norm(wanted))
    posthoc_coefficients(keys, step, length, max_error=error * 1.001)
    with pytest.raises(ValueError, match=f"error of {error:.2g}"):
        posthoc_coefficients(keys, step, length, max_error=error * 0.999)


def test_dropped_checkpoints_leave_their_power_averages(tmp_path):
    settings = ["train.ema_lengths=[0.05, 0.1]", "train.checkpoint_every=1"]
    config = tiny(tmp_path, *settings)
    whole = RunFolder.open(train(config))
    kept = RunFolder.open(train(again(config, "name=kept", "train.keep_checkpoints=2")))
    assert kept.steps() == [7, 8]
    left = sorted((kept.path / "averages").glob("*/*"))
    assert {file.name for file in left} == {f"power-{x}.safetensors" for x in (0.05, 0.1)}
    assert [folder.name for folder in sorted((kept.path / "averages").iterdir())] == [
        f"step-{step:08d}" for step in range(1, 7)
    ]
    found, expected = (run.load_weights(8, "posthoc-0.14") for run in (kept, whole))
    for key, value in expected.items():
        assert torch.equal(found[key], value)
    with pytest.raises(ConfigError, match=r"weights posthoc-0\.02: 16 stored averages up to"):
        kept.load_weights(8, "posthoc-0.02")


def test_a_drop_that_was_cut_is_finished(tmp_path):
    config = tiny(tmp_path, "train.ema_lengths=[0.05, 0.1]", "train.checkpoint_every=1")
    config = again(config, "train.keep_checkpoints=2")
    path = train(config)
    oldest = path / "checkpoints" / "step-00000007"
    oldest.rename(oldest.with_name("step-00000007.dropped"))
    assert RunFolder.open(path).steps() == [8]
    train(again(config, "train.steps=10"), resume=True)
    assert len(list((path / "averages" / "step-00000007").iterdir())) == 2
    assert {item.name for item in (path / "checkpoints").iterdir()} == {
        "step-00000009", "step-00000010",
    }  # fmt: skip


def test_a_run_keeps_several_averages_and_makes_others(tmp_path):
    config = tiny(tmp_path, "train.ema_decays=[0.9, 0.3]", "train.ema_lengths=[0.05, 0.1]")
    path = train(again(config, "train.checkpoint_every=2"))
    run = RunFolder.open(path)
    key = "final.weight"
    names = ("raw", "ema-0.9", "ema-0.3", "power-0.05", "power-0.1")
    found = {name: run.load_weights(8, name)[key] for name in names}
    assert torch.equal(found["ema-0.9"], run.load_weights(8, "ema")[key])
    assert len({value.sum().item() for value in found.values()}) == len(names)
    made = run.load_weights(8, "posthoc-0.1")[key]
    torch.testing.assert_close(made, weights(path, 8, "power-0.1")[key], rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match=r"no weights 'ema-0\.7'; there are: raw, ema, ema-0"):
        run.load_weights(8, "ema-0.7")
    with pytest.raises(ConfigError, match="posthoc-2: power-function length 2"):
        run.load_weights(8, "posthoc-2")
    resumed = train(again(config, "train.steps=10"), resume=True)
    straight = train(again(config, "train.steps=10", "name=straight"))
    for name in ("ema-0.3", "power-0.05"):
        assert torch.equal(weights(resumed, 10, name)[key], weights(straight, 10, name)[key])


def test_post_hoc_needs_stored_lengths(tmp_path):
    run = RunFolder.open(train(tiny(tmp_path)))
    with pytest.raises(ConfigError, match=r"posthoc-0.1 needs a run with train.ema_lengths"):
        run.load_weights(8, "posthoc-0.1")


def test_averages_apply_and_give_the_weights_back():
    model = torch.nn.Linear(3, 2)
    ema = EMA(model, [Average(decay=0.5)])
    with torch.no_grad():
        model.weight.add_(1)
    ema.update(1)
    own = model.weight.detach().clone()
    with ema.applied(model):
        assert torch.equal(model.weight, ema.values["ema-0.5"]["weight"])
        assert not torch.equal(model.weight, own)
    assert torch.equal(model.weight, own)
