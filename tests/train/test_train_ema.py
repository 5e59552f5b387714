"""Weight averages during training: against their definitions, saved, resumed and applied."""

import doctest

import pytest
import torch
from tiny import again, tiny, weights

from flowdopr.config import ConfigError
from flowdopr.runs import Average, RunFolder
from flowdopr.train import EMA, ema, train


def test_the_examples_run():
    found = doctest.testmod(ema)
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize("average", [Average(decay=0.6), Average(length=0.1)])
def test_updates_follow_the_rule_of_the_average(average):
    model = torch.nn.Linear(7, 1, bias=False).double()
    averages = EMA(model, [average])
    expected = model.weight.detach().clone()
    for step in range(1, 31):
        torch.nn.init.normal_(model.weight)
        averages.update(step)
        keep = average.keep(step)
        expected = keep * expected + (1 - keep) * model.weight.detach()
    torch.testing.assert_close(averages.values[average.name]["weight"], expected)


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
