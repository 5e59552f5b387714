"""Sections chosen by a name: short forms, what a change of name keeps, and settings that would do
nothing, which cannot be written."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from flowdopr.cli import run_command
from flowdopr.config import (
    ConfigError,
    DoPrConfig,
    apply_overrides,
    effective,
    load_config,
    to_dict,
    to_yaml,
)
from flowdopr.config.model import PCConfig
from flowdopr.config.optimizer import WithDoPr
from flowdopr.config.schema import Config
from flowdopr.config.types import choices, names_of
from flowdopr.models import add_pc_layers
from flowdopr.optim import OPTIMIZER_NAMES, DoPr, LayerRule, build_optimizer
from flowdopr.optim.build import OPTIMIZERS
from flowdopr.train.start import optimizer_arguments

SMALL = """
name: small
data: {name: digits}
model: {name: dit}
train: {steps: 10, global_batch_size: 8}
"""
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SECTIONS = choices(Config.model_fields["optimizer"])


@pytest.fixture
def load(tmp_path):
    """`load("yaml text", "a.b=c", ...)`: a small config with more text and overrides."""

    def load(text="", *overrides, base=None):
        path = tmp_path / "small.yaml"
        if base is not None:
            (tmp_path / "base.yaml").write_text(SMALL + base)
        path.write_text((SMALL if base is None else "base: base.yaml\n") + text)
        return load_config(path, overrides)

    return load


def optimizer_of(config):
    """What differs from the defaults, with the name."""
    return {"name": config.optimizer.name} | config.optimizer.model_dump(exclude_defaults=True)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("flow.path=cosine", "flow.path={name: cosine}"),
        ("flow={weighting: edm}", "flow={weighting: {name: edm}}"),
        ("sample.solver=dopri5", "sample.solver={name: dopri5}"),
        ("sample.solver.grid=edm", "sample.solver.grid={name: edm}"),
        ("sample.solver.grid=[0, 0.5, 1]", "sample.solver.grid={name: list, times: [0, 0.5, 1]}"),
        ("evaluate.extractor=inception", "evaluate.extractor={name: inception}"),
        ("optimizer=dopr-muon", "optimizer={name: muon, dopr: {}}"),
        ("optimizer.name=dopr-muon", "optimizer={name: muon, dopr: {}}"),
        (
            "optimizer={name: dopr-sgd, dopr: {power: 0.5}}",
            "optimizer={name: sgd, dopr: {power: 0.5}}",
        ),
    ],
)
def test_short_forms_are_written_out_everywhere(load, tmp_path, short, long):
    config = load("", long)
    assert load("", short) == config
    assert apply_overrides(load(), [short]) == config
    key, _, value = short.partition("=")
    *sections, last = key.split(".")
    if last != "name":
        opened = "".join(f"{section}: {{" for section in sections)
        assert load(f"{opened}{last}: {value}{'}' * len(sections)}\n") == config
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config
    assert "dopr-" not in to_yaml(config)


@pytest.mark.parametrize(
    ("base", "over", "expected"),
    [
        ("{name: adamw, lr: 1, eps: 2}", "dopr-adamw", {"lr": 1, "eps": 2, "dopr": {}}),
        ("{name: dopr-adamw, lr: 1}", "adamw", {"lr": 1}),
        ("{name: dopr-adamw, dopr: {power: 2}}", "{lr: 3}", {"lr": 3, "dopr": {"power": 2}}),
        ("{name: dopr-sgd, dopr: {power: 2}}", "dopr-sgd", {"dopr": {"power": 2}}),
        ("{name: dopr-sgd, dopr: {power: 2}}", "{dopr: {form: sandwich}}",
         {"dopr": {"power": 2, "form": "sandwich"}}),
        ("{name: dopr-sgd, dopr: {power: 2}}", "{dopr: null}", {}),
        ("{name: dopr-muon, lr: 1, dopr: {power: 2}}", "{name: adamw, eps: 2}", {"eps": 2}),
        ("{lr: 1}", "adamw", {"lr": 1}),
    ],
)  # fmt: skip
def test_a_file_over_another(load, base, over, expected):
    found = optimizer_of(load(f"optimizer: {over}\n", base=f"optimizer: {base}\n"))
    found.pop("name")
    assert found == expected


@pytest.mark.parametrize(
    ("given", "overrides", "expected"),
    [
        # A name keeps what was set to other values than the old name's defaults.
        ("{name: adamw, lr: 1, betas: [0.8, 0.9]}", "name=muon",
         {"name": "muon", "lr": 1, "betas": (0.8, 0.9)}),
        ("{name: adamw, betas: [0.9, 0.999]}", "name=muon", {"name": "muon"}),
        ("{name: dopr-adamw, lr: 1, dopr: {damping: 2}}", "name=muon", {"name": "muon", "lr": 1}),
        ("{name: dopr-adamw, lr: 1, dopr: {damping: 2}}", "name=adamw", {"name": "adamw", "lr": 1}),
        ("{name: dopr-adamw, lr: 1, dopr: {damping: 2}}", "name=dopr-muon",
         {"name": "muon", "lr": 1, "dopr": {"damping": 2}}),
        ("{name: adamw, lr: 1}", "name=dopr-adamw", {"name": "adamw", "lr": 1, "dopr": {}}),
        ("{name: adamw, lr: 1}", "dopr.damping=3",
         {"name": "adamw", "lr": 1, "dopr": {"damping": 3}}),
        ("{name: dopr-sgd, lr: 1}", "name=kfac", {"name": "kfac", "lr": 1}),
        ("{lr: 1}", "name=sgd", {"name": "sgd", "lr": 1}),
    ],
)  # fmt: skip
def test_an_override_of_a_name(load, given, overrides, expected):
    overrides = [f"optimizer.{overrides}"]
    config = load(f"optimizer: {given}\n", *overrides)
    assert optimizer_of(config) == expected
    # From the resolved config, where every default is written, nothing else comes out.
    assert apply_overrides(load(f"optimizer: {given}\n"), overrides) == config


def test_a_list_of_times_has_its_own_number_of_steps(load):
    solver = load("", "sample.solver={name: heun2, grid: [0, 0.1, 0.4, 1]}").sample.solver
    assert solver.steps == 3
    assert load("", "sample.solver.grid=[0, 1]", "sample.solver.steps=1").sample.solver.steps == 1
    base = "sample: {solver: {steps: 9}}\n"
    assert load("sample: {solver: {grid: [0, 1]}}\n", base=base).sample.solver.steps == 1
    with pytest.raises(ConfigError, match=r"sample.solver.steps is 7 but .* lists 1 intervals: se"):
        load("", "sample.solver.grid=[0, 1]", "sample.solver.steps=7")
    for times in ("[0]", "[0, 0.5, 0.5]", "[0.1, 1]", "[0, 0.7, 0.3]", "[0, 1.5]"):
        with pytest.raises(ConfigError, match=r"sample\.solver\.grid\.times"):
            load("", f"sample.solver.grid={times}")


NOTHING = {
    "flow.weighting.sigma_data=1": "uniform has no such setting; it belongs to edm",
    "flow.time.mean=1": "uniform has no such setting; it belongs to logit_normal",
    "flow.coupling.iterations=9 flow.coupling.name=exact": "it belongs to entropic",
    "flow.path.power=2": "linear has no such setting; it belongs to polynomial",
    "sample.solver.steps=7 sample.solver.name=dopri5": "dopri5 has no such setting; it has atol, r",
    "sample.solver.grid.rho=2": "uniform has no such setting; it belongs to edm",
    "sample.solver.noise_scale=0": "it belongs to euler_maruyama and sde_heun",
    "sample.solver=explicit_adams sample.solver.grid=edm": "explicit_adams has no such setting",
    "sample.solver=explicit_adams sample.solver.atol=1": "explicit_adams has no such setting",
    "sample.solver.atol=1e-3": "midpoint has no such setting",
    "sample.guidance.scale=1": "set sample.guidance=null, or another scale",
    "sample.guidance.interval=[0,0.5]": "sample.guidance.scale: missing",
    "evaluate.bpd_trace=exact": "evaluate.bpd_trace: unknown key; did you mean 'bpd.trace'?",
    "evaluate.metrics=[bpd]": "evaluate.metrics.0: unknown value 'bpd'",
    "evaluate.extractor.weights=w.pth": "classifier has no such setting; it belongs to inception",
    "optimizer.momentum=0.5": "adamw has no such setting",
    "optimizer.damping=1": "adamw has no such setting; did you mean 'dopr.damping'?",
    'optimizer.dopr.rules=[{"pattern":"x","mode":"none","max_rows":9}]': "max_rows=9 is not used",
    "optimizer.name=kfac optimizer.dopr.damping=1": "kfac has no such setting",
    "optimizer.dopr.unit_scale=true": "optimizer.dopr.unit_scale: unknown key",
    "data.resize=adm data.name=folder": "data.resize=adm needs data.image_size",
    "optimizer.name=AdamW": "unknown name 'AdamW'; did you mean 'adamw'?",
    "optimizer.name=dopr-moun": "unknown name 'dopr-moun'; did you mean 'dopr-muon'?",
    "optimizer.name=dopr-kfac": "unknown name 'dopr-kfac'; choose one of dopr-sgd, dopr-adamw",
    "optimizer=[]": "optimizer: must be one of the names sgd, adamw,",
    "sample.solver=3": "sample.solver: must be one of the names euler,",
    "flow=null": "flow: must be a mapping such as {path: ...}, got null",
}


@pytest.mark.parametrize("overrides", NOTHING)
def test_a_setting_that_would_do_nothing_cannot_be_written(load, overrides):
    for act in (load, lambda _, *given: apply_overrides(load(), given)):
        with pytest.raises(ConfigError) as caught:
            act("", *overrides.split())
        assert NOTHING[overrides] in str(caught.value)
        assert str(caught.value).startswith("override '")
        assert "\n" not in str(caught.value)


IDLE = {  # a setting that the settings behind it leave without effect, and its default
    ("data.root=elsewhere", "data"): "",
    ("data.download=false", "true"): "",
    ("data.num_workers=2", "0"): "",
    ("data.resize=adm", "bilinear"): "",
    ("data.held_out_root=other", "null"): "",
    ("data.autoencoder=other", "null"): "",
    ("data.source_root=other", "null"): "",
    ("data.held_out_fraction=0.5", "0.1"): "data.name=mnist",
    ("data.image_size=8", "null"): "data.name=latents",
    ("data.channels=1", "null"): "data.name=latents",
    ("model.size=B", "S"): "model.depth=1 model.hidden_size=8 model.num_heads=2",
    ("model.num_heads=2", "4"): "model=unet model.head_channels=8",
    ("model.resample=pool", "conv"): "model=unet model.channel_multipliers=[1]",
    ("flow.class_dropout_prob=0.5", "0.1"): "model.class_conditional=false",
    ("evaluate.labels=data", "balanced"): "model.class_conditional=false",
    ("flow.coupling=exact", "independent"): "train.accumulation_steps=8",
    ("flow.time.stratified=false", "true"): "train.global_batch_size=1",
    ("optimizer.nesterov=true", "false"): "optimizer=sgd",
    ("optimizer.nesterov=false", "true"): "optimizer=muon optimizer.momentum=0",
    ("optimizer.dopr.conv_mode=sua", "auto"): "optimizer=dopr-sgd",
    ("optimizer.dopr.pc_gradient=effective", "raw"): "optimizer=dopr-sgd",
    ("train.lr_decay=cosine", "constant"): "train.warmup_steps=10",
}


@pytest.mark.parametrize(("setting", "default"), IDLE)
def test_a_setting_that_others_leave_idle_is_refused_unless_it_is_the_default(
    load, setting, default
):
    others = IDLE[setting, default].split()
    key, _, value = setting.partition("=")
    with pytest.raises(ConfigError) as caught:
        load("", *others, setting)
    said = f"override {setting!r}: {key}={value} is not used "
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith(f": remove it, or set {key}={default}")
    assert load("", *others, f"{key}={default}") == load("", *others)


def test_a_file_takes_back_what_its_base_sets_and_it_leaves_idle(load):
    base = "flow: {class_dropout_prob: 0.3}\n"
    with pytest.raises(ConfigError, match=r"set flow.class_dropout_prob=0.1$"):
        load("model: {class_conditional: false}\n", base=base)
    text = "model: {class_conditional: false}\nflow: {class_dropout_prob: 0.1}\n"
    assert not load(text, base=base).model.class_conditional


RATES = "optimizer.lr comes from the lrs of compare.arms"


@pytest.mark.parametrize(
    ("command", "override", "words"),
    [
        ("compare", "seed=3", "in a study seed comes from compare.seeds; set that"),
        ("compare", "optimizer.lr=1", f"in a study {RATES}; set that"),
        ("compare", "optimizer={name: adamw, lr: 1}", f"in a study {RATES}; set that"),
        ("encode --autoencoder x --out y", "train.steps=3", "only data.* is used here; remove it"),
    ],
)
def test_an_override_that_a_command_does_not_use_is_refused(capsys, command, override, words):
    name, *options = command.split()
    assert run_command([name, str(QUICKSTART), *options, override]) == 2
    assert capsys.readouterr().err == f"flowdopr: override {override!r}: {words}\n"


def test_a_name_with_dopr_and_without_it_at_once_is_refused(load):
    with pytest.raises(ConfigError, match=r"dopr-sgd and optimizer.dopr is null: write name: sgd"):
        load("optimizer: {name: dopr-sgd, dopr: null}\n")


def defaults_of(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_the_schema_names_every_optimizer():
    assert set(SECTIONS) == set(OPTIMIZER_NAMES)
    assert {name for name, section in SECTIONS.items() if issubclass(section, WithDoPr)} == {
        name for name in OPTIMIZER_NAMES if name != "kfac"
    }


@pytest.mark.parametrize("name", SECTIONS)
def test_settings_of_an_optimizer_are_its_arguments_with_its_defaults(name):
    own = defaults_of(OPTIMIZERS[name])
    section = SECTIONS[name]
    assert names_of(section) == (name,)
    for key, field in section.model_fields.items():
        if key not in {"name", "lr", "dopr"}:
            default = inspect.Parameter.empty if field.is_required() else field.default
            assert default == own[key], key
    assert own.keys() - section.model_fields.keys() <= {"ns_coefficients"}


def test_settings_of_dopr_are_its_arguments_with_its_defaults():
    own = defaults_of(DoPr)
    for key, field in DoPrConfig.model_fields.items():
        # That of a config depends on train.steps, which DoPr does not know.
        assert field.default == own[key] or key == "damping", key
    assert own.keys() == DoPrConfig.model_fields.keys()
    rules = DoPrConfig(rules=({"pattern": "a"},)).rules
    assert LayerRule(**rules[0].model_dump()) == LayerRule("a")


def test_settings_of_pc_layers_are_their_arguments_with_their_defaults():
    own = inspect.signature(add_pc_layers).parameters
    assert {key: field.default for key, field in PCConfig.model_fields.items()} == {
        key: parameter.default for key, parameter in own.items() if key != "model"
    }


@pytest.mark.parametrize("name", [*SECTIONS, "dopr-adamw", "dopr-muon"])
def test_every_optimizer_is_built_from_the_config(load, name):
    overrides = [f"optimizer.name={name}"]
    if "muon" in name:
        overrides.append("optimizer.ns_dtype=bfloat16")
    if name == "outside":
        overrides.append("optimizer.class_path=torch.optim.RAdam")
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = build_optimizer(model, **optimizer_arguments(load("", *overrides)))
    assert (type(optimizer) is DoPr) == name.startswith("dopr-")
    if "muon" in name:
        assert optimizer.param_groups[0]["ns_dtype"] is torch.bfloat16


def test_the_config_of_a_run_says_what_relative_settings_stand_for(load, tmp_path, capsys):
    config = load("", "optimizer=dopr-muon", "optimizer.lr=2")
    assert effective(config).optimizer.adamw_lr == 2
    assert effective(load("", "optimizer=muon", "optimizer.adamw_lr=3")).optimizer.adamw_lr == 3
    assert effective(load()) == load()
    falling = load("", "optimizer=dopr-muon", "optimizer.dopr.damping=[10, 1, 0.3]")
    steps = effective(falling).optimizer.dopr.damping[2]
    assert (steps, falling.train.steps) == (3, 10)
    assert effective(effective(falling)) == effective(falling)
    assert apply_overrides(config, ["optimizer.lr=5"]).optimizer.adamw_lr is None
    for command, value in (
        ("train", "2.0"),
        ("compare", "null"),
    ):  # each run of a study has its own
        settings = [str(tmp_path / "small.yaml"), "optimizer=muon", "optimizer.lr=2"]
        assert run_command([command, *settings, "--print-config"]) == 0
        assert f"adamw_lr: {value}\n" in capsys.readouterr().out


@pytest.mark.parametrize("steps", ["0", "-0.5", "1.5", "2.5", ".inf", ".nan"])
def test_the_steps_of_a_damping_are_whole_or_a_share(load, steps):
    with pytest.raises(ConfigError, match=r"optimizer\.dopr\.damping\.2: must be a"):
        load("", "optimizer=dopr-muon", f"optimizer.dopr.damping=[10, 1, {steps}]")


def test_the_whole_config_is_plain_values(load):
    config = load("", "optimizer=dopr-muon", "sample.guidance={scale: 2}", "evaluate.bpd={}")
    assert to_dict(config)["optimizer"]["dopr"]["damping"] == [100, 1, 0.5]
    assert to_dict(config)["sample"]["solver"] == {
        "name": "midpoint",
        "steps": 50,
        "grid": {"name": "uniform"},
    }
