"""Settings that do not fit together end `train` in one line, before anything is written."""

import pytest
from untrained import make_config

from flowdopr.config import ConfigError, apply_overrides
from flowdopr.evaluate import sample
from flowdopr.train import train

WRONG = {
    "sample.solver=ddim": "choose one of euler",
    "sample.solver=dopri5 sample.time_grid=edm": "chooses its own times",
    "sample.time_grid=[0.0,0.7,0.3,1.0]": "two or more increasing times",
    "sample.solver=sde_heun flow.coupling=exact": "needs a score",
    "sample.solver=euler_maruyama flow.coupling=entropic": "needs a score",
    "flow.path_options.power=2.0": "no option of linear",
    "flow.path=polynomial flow.path_options.power=0.5": "power=0.5",
    "sample.guidance_scale=2.0 model.class_conditional=false": "needs a class-conditional model",
    "sample.guidance_scale=2.0 flow.class_dropout_prob=0": "needs an unconditional branch",
    "sample.guidance_interval=[0.5,0.5]": "need 0 <= low < high <= 1",
    "sample.guide_run=nowhere": "has no effect at sample.guidance_scale 1",
    "sample.guide_run=nowhere sample.guidance_scale=2.0": "not a run folder",
    "data.name=latents data.root=nowhere": "has no latents.json",
    "data.autoencoder=somewhere": "is not used by data.name=digits",
}


@pytest.mark.parametrize("settings", WRONG)
def test_training_refuses(settings, tmp_path):
    with pytest.raises(ValueError, match=WRONG[settings]) as caught:
        train(apply_overrides(make_config(tmp_path / "runs"), settings.split()))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "settings",
    [
        "sample.solver=sde_heun flow.path=variance_preserving flow.prediction=noise",
        "flow.coupling=entropic flow.path=cosine flow.prediction=data sample.solver=heun2",
    ],
)
def test_training_accepts_what_fits(settings, tmp_path):
    config = apply_overrides(make_config(tmp_path), settings.split())
    assert (train(config) / "samples" / "step-00000002.png").is_file()


def test_a_run_opens_with_what_an_override_left_idle(make_run, tmp_path):
    """A resolved config gives every setting, so none of them counts as wished for."""
    config = apply_overrides(make_run().config, ["name=left", "sample.solver=dopri5"])
    path = train(config)
    assert "steps: 2" in (path / "config.yaml").read_text()
    train(config, resume=True)
    sample(path, num=1, out=tmp_path / "ode")
    sample(path, num=1, out=tmp_path / "sde", solver="sde_heun", steps=3)
    with pytest.raises(ConfigError, match=r"sample\.steps=3 has no effect with sample\.solver"):
        sample(path, num=1, out=tmp_path / "out", steps=3)
