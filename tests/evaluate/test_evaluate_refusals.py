"""Settings that do not fit together end `train` in one line, before anything is written."""

import pytest
from untrained import make_config

from flowdopr.config import apply_overrides
from flowdopr.train import train

WRONG = {
    "sample.solver=sde_heun flow.coupling=exact": "needs a score",
    "sample.solver=euler_maruyama flow.coupling=entropic": "needs a score",
    "flow.path.name=variance_preserving flow.path.beta_min=30": "beta_min=30",
    "sample.guidance.scale=2.0 model.class_conditional=false": "needs a class-conditional model",
    "sample.guidance.scale=2.0 flow.class_dropout_prob=0": "needs an unconditional branch",
    "sample.guidance.scale=2 sample.guidance.guide.run=nowhere": "not a run folder",
    "data.name=latents data.root=nowhere": "has no latents.json",
    "data.autoencoder=somewhere": "is not used by data.name=digits",
}


@pytest.mark.parametrize("settings", WRONG)
def test_training_refuses(settings, tmp_path):
    with pytest.raises(ValueError, match=WRONG[settings]) as caught:
        train(apply_overrides(make_config(tmp_path / "runs"), settings.split()))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("setting", ["flow.class_dropout_prob=0.3", "evaluate.labels=data"])
def test_labels_of_data_without_classes_are_refused(setting, tmp_path, write_images):
    root = write_images(tmp_path / "flat", {"": 12})
    data = ["data.name=folder", f"data.root={root}", f"output={tmp_path / 'runs'}", setting]
    with pytest.raises(
        ValueError, match=f"^{setting} is not used with data that have no classes: "
    ):
        train(apply_overrides(make_config(tmp_path / "runs"), data))
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
