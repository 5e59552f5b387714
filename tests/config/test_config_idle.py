"""Settings that do nothing are refused where they are wished for, and never where they are left
over."""

import pytest

from flowdopr.config import ConfigError, apply_overrides, load_config, to_dict, to_yaml
from flowdopr.config.idle import ADAPTIVE, STOCHASTIC, TOLERANT, USES
from flowdopr.flow import ADAPTIVE_SOLVERS, BATCH_DEPENDENT_SOLVERS, SDE_SOLVERS

SMALL = """
name: small
data: {name: digits}
model: {name: dit}
train: {steps: 10, global_batch_size: 8}
"""
IDLE = {
    "flow.sigma_data=1": "with flow.weighting=uniform: it belongs to flow.weighting=edm, or leave",
    "flow.time_mean=1": "flow.time_mean=1.0 has no effect with flow.time_distribution=uniform",
    "flow.time_std=2 flow.time_distribution=edm": "with flow.time_distribution=edm",
    "flow.coupling_iterations=9 flow.coupling=exact": "with flow.coupling=exact",
    "flow.coupling_regularisation=1": "it belongs to flow.coupling=entropic",
    "sample.steps=7 sample.solver=dopri5": "sample.steps=7 has no effect with sample.solver=dopri5",
    "sample.steps=7 sample.time_grid=[0,1]": r"with sample.time_grid=\[0.0, 1.0\]: a list of times",
    "sample.grid_shift=2": "it belongs to sample.time_grid=shifted, or leave it at 3.0",
    "sample.grid_rho=2 sample.time_grid=shifted": "with sample.time_grid=shifted",
    "sample.noise_scale=0": "with sample.solver=midpoint: it belongs to euler_maruyama and",
    "sample.last_step=mean": "with sample.solver=midpoint: it belongs to euler_maruyama and",
    "sample.last_step_size=0.04 sample.solver=euler": "with sample.solver=euler: it belongs to",
    "sample.guidance_interval=[0,0.5]": "with sample.guidance_scale=1.0: there is no guidance",
    "sample.atol=1e-3": "it belongs to adaptive solvers such as dopri5, and to the metric bpd",
    "sample.rtol=1e-3 sample.solver=rk4": "with sample.solver=rk4",
    "evaluate.bpd_trace=exact": "add bpd to the metrics, or leave it at hutchinson",
    "evaluate.bpd_num_images=2": "add bpd to the metrics",
    "evaluate.excess_space=data": "add excess to the metrics",
    "evaluate.excess_num_images=2 evaluate.metrics=[bpd]": "add excess to the metrics",
    "evaluate.inception_weights=w.pth": "it belongs to evaluate.extractor=inception, or leave",
}
ACTING = [
    "flow.sigma_data=1 flow.weighting=edm",
    "flow.time_mean=1 flow.time_std=2 flow.time_distribution=logit_normal",
    "flow.coupling_iterations=9 flow.coupling_regularisation=1 flow.coupling=entropic",
    "sample.steps=7 sample.time_grid=edm sample.grid_rho=5",
    "sample.time_grid=shifted sample.grid_shift=2",
    "sample.solver=sde_heun sample.noise_scale=0",
    "sample.solver=euler_maruyama sample.last_step=mean sample.last_step_size=0.04",
    "sample.guidance_interval=[0,0.5] sample.guidance_scale=0",
    "sample.atol=1e-3 sample.solver=implicit_adams",
    "sample.rtol=1e-3 evaluate.metrics=[bpd] evaluate.bpd_trace=exact evaluate.bpd_num_images=2",
    "evaluate.excess_num_images=2 evaluate.excess_space=data evaluate.metrics=[excess]",
    "evaluate.inception_weights=w.pth evaluate.extractor=inception",
]


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_the_names_of_solvers_are_those_of_the_flow_room():
    assert set(ADAPTIVE) == set(ADAPTIVE_SOLVERS)
    assert set(TOLERANT) == set(BATCH_DEPENDENT_SOLVERS)
    assert set(STOCHASTIC) == set(SDE_SOLVERS)


def test_every_entry_is_tried_in_both_ways():
    settings = {use.setting for use in USES}
    assert settings == {text.split("=")[0] for text in IDLE}
    given = {item.split("=")[0] for text in ACTING for item in text.split()}
    assert settings <= given


@pytest.mark.parametrize("settings", IDLE)
def test_an_idle_setting_is_refused_in_a_file_and_as_an_override(small, settings):
    with pytest.raises(ConfigError, match=IDLE[settings]) as caught:
        load_config(small, settings.split())
    assert str(caught.value).startswith(f"{small}: ")
    assert "\n" not in str(caught.value)
    config = load_config(small)
    with pytest.raises(ConfigError, match=IDLE[settings]):
        apply_overrides(config, settings.split())
    lines = [item.replace("=", ": ", 1).split(".", 1) for item in settings.split()]
    sections = {}
    for section, line in lines:
        sections.setdefault(section, []).append(line)
    text = "".join(f"{name}: {{{', '.join(items)}}}\n" for name, items in sections.items())
    small.write_text(SMALL + text)
    with pytest.raises(ConfigError, match=IDLE[settings]):
        load_config(small)


@pytest.mark.parametrize("settings", ACTING)
def test_a_setting_that_acts_is_taken(small, settings):
    config = load_config(small, settings.split())
    assert apply_overrides(load_config(small), settings.split()) == config
    small.write_text(to_yaml(config))
    assert load_config(small) == config


def test_the_default_is_never_refused(small):
    config = load_config(small)
    small.write_text(to_yaml(config))
    assert load_config(small, ["sample.steps=50", "sample.solver=dopri5"]).sample.steps == 50


def test_what_a_later_choice_made_idle_stays(small, tmp_path):
    small.write_text(SMALL + "sample: {solver: midpoint, steps: 7}\n")
    config = load_config(small, ["sample.solver=dopri5"])
    assert config.sample.steps == 7
    child = tmp_path / "child.yaml"
    child.write_text("base: small.yaml\nsample: {solver: dopri5}\n")
    assert load_config(child) == config
    child.write_text("base: small.yaml\nsample: {solver: dopri5, steps: 8}\n")
    with pytest.raises(
        ConfigError, match=r"sample\.steps=8 has no effect with sample\.solver=dopri5"
    ):
        load_config(child)
    assert apply_overrides(config, ["sample.solver=rk4"]).sample.steps == 7
    with pytest.raises(ConfigError, match=r"sample\.steps=8 has no effect"):
        apply_overrides(config, ["sample.steps=8"])


def test_a_resolved_file_holds_what_was_left_over(small):
    small.write_text(SMALL + "sample: {solver: midpoint, steps: 7}\n")
    config = load_config(small, ["sample.solver=dopri5"])
    small.write_text(to_yaml(config))
    assert load_config(small, resolved=True) == config
    with pytest.raises(ConfigError, match="or leave it at 50"):
        load_config(small)
    assert load_config(small, ["sample.steps=50"]).sample.steps == 50  # the remedy works


def test_a_setting_that_acts_in_an_arm_is_taken(small):
    arms = "[{name: A, lrs: [1]}, {name: B, lrs: [1], set: {flow.weighting: edm}}]"
    settings = ["flow.sigma_data=1", f"compare={{arms: {arms}}}"]
    config = load_config(small, settings)
    assert to_dict(config)["flow"]["sigma_data"] == 1
    with pytest.raises(ConfigError, match=r"flow\.sigma_data"):
        load_config(small, settings[:1])
