"""Typical mistakes, each with the exact line that it ends with: place, key, value and remedy."""

import pytest

from flowdopr.config import ConfigError, load_config

SMALL = """name: small
data: {name: digits}
model: {name: dit}
optimizer: {name: adamw, lr: 1e-3}
train: {steps: 10, global_batch_size: 8}
"""
# fmt: off
IN_A_FILE = [  # what replaces what in SMALL, and the line
    ("steps: 10", "stepz: 10",
     "train.stepz: unknown key; did you mean 'steps'?; train.steps: missing; this setting has no "
     "default"),
    ("train:", "trian:",
     "trian: unknown key; did you mean 'train'?; train: missing; this setting has no default"),
    ("train:", "\ttrain:",
     "cannot be read as a config: line 5, column 1: found character '\\t' that cannot start any "
     "token; indent by spaces instead of tabs"),
    ("train: ", "train ",
     "cannot be read as a config: line 5, column 36: mapping values are not allowed here; quote "
     "text that holds ': ', or see whether the line before lacks its ': '"),
    ("train:", " train:",
     "cannot be read as a config: line 5, column 2: expected <block end>, but found '<block "
     "mapping start>'; indent this line as its neighbours, or double the quotes inside text"),
    ("train: {", "train:{",
     "cannot be read as a config: line 5, column 36: mapping values are not allowed here; quote "
     "text that holds ': ', or see whether the line before lacks its ': '"),
    ("steps: 10", "steps 10",
     "train.steps 10: unknown key; did you mean 'steps'?; train.steps: missing; this setting has "
     "no default"),
    ("dit}", "dit",
     "cannot be read as a config: line 4, column 10: expected ',' or '}', but got ':'"),
    ("name: small", "name: 2024",
     'name: must be text, got 2024; write "2024"'),
    ("name: small", "name: my run",
     "name: must be of A-Z, a-z, 0-9, '.', '_' and '-', and begin with a letter or digit; '/' "
     'goes between folders, got "my run"'),
    ("name: small", "name: a: b",
     "cannot be read as a config: line 1, column 8: mapping values are not allowed here; quote "
     "text that holds ': ', or see whether the line before lacks its ': '"),
    ("name: small", "name: 'it's'",
     "cannot be read as a config: line 1, column 11: expected <block end>, but found '<scalar>'; "
     "indent this line as its neighbours, or double the quotes inside text"),
    ("name: small", "name: %x",
     "cannot be read as a config: line 1, column 7: found character '%' that cannot start any "
     "token; put the text in quotes"),
    ("name: small", "name: *x",
     "cannot be read as a config: line 1, column 7: an anchor or alias 'x' is not taken; write "
     "the value itself, in quotes if it is text"),
    ("name: small", "name: !!str x",
     "cannot be read as a config: line 1, column 7: a tag 'tag:yaml.org,2002:str' is not taken; "
     "write the value itself, in quotes if it is text"),
    ("name: small", "name: small\nname: small",
     "cannot be read as a config: line 2, column 1: the key 'name' is given twice"),
    ("name: small", "name: small\n1: x",
     "cannot be read as a config: line 2, column 1: the key 1 is not a word; put it in quotes"),
    ("name: small", "name: small\nlr: 1",
     "lr: unknown key; did you mean 'optimizer.lr'?"),
    ("name: small", "name: small\nbatch_size: 1",
     "batch_size: unknown key; did you mean 'sample.batch_size' or 'train.global_batch_size'?"),
    ("name: small", "name: small\noptimizer.lr: 1",
     "optimizer.lr: unknown key in a file; write optimizer: {lr: ...}"),
    ("name: small", "- name: small",
     "cannot be read as a config: line 2, column 1: expected <block end>, but found '?'; indent "
     "this line as its neighbours, or double the quotes inside text"),
    ("name: small", "",
     "name: missing; this setting has no default"),
    ("{name: digits}", "digits",
     'data: must be a mapping such as {name: ...}, got "digits"'),
    ("name: dit", "size: S",
     "model.name: missing; choose one of dit, unet, own"),
    ("adamw, ", "AdamW, ",
     "optimizer.name: unknown name 'AdamW'; did you mean 'adamw'?"),
    ("1e-3", '"1e-3"',
     'optimizer.lr: must be a number, got "1e-3"; write 1e-3 without quotes'),
    ("1e-3", "0,001",
     "optimizer.001: adamw has no such setting; it has lr, weight_decay, dopr, betas, eps; "
     "optimizer.lr: must be greater than 0, got 0"),
    ("steps: 10", "steps: 1e3",
     "train.steps: must be a whole number, got 1000.0; write 1000"),
]

OVERRIDES = [
    (
        "evaluate={metrics: [isc], extractor: {name: dinov2, weights: dinov2.pth}}",
        "evaluate.metrics: isc needs a network that classifies, and dinov2 does not; remove it, or "
        "choose evaluate.extractor=imagenet",
    ),
    ("train.steps",
     "write section.key=value, without spaces"),
    ("train.steps =3",
     "write section.key=value, without spaces"),
    ("train.steps=",
     "train.steps: must be a whole number, got null"),
    ("train.steps=-1",
     "train.steps: must be greater than or equal to 1, got -1"),
    ("train=3",
     "train: must be a mapping such as {steps: ...}, got 3"),
    ("train.steps.x=3",
     "'steps' is a value, not a section"),
    ("name.first=x",
     "'name' is a value, not a section"),
    ("optimizer.betas.0=0.5",
     "'betas' is a list, which cannot be changed in part; set all of it"),
    ("optimizer.betas=[0.9,",
     "line 1, column 6: expected the node content, but found '<stream end>'; close the bracket "
     "or the quote"),
    ("optimizer.betas=0.9",
     "optimizer.betas: must be a list, got 0.9; write [0.9]"),
    ("train.ema_decays='.9, .99'",
     'train.ema_decays: must be a list, got ".9, .99"; write [.9, .99]'),
    ("train.ema_decays=null",
     "train.ema_decays: must be a list, got null"),
    ("evaluate.metrics=[fid]",
     "evaluate.metrics.0: unknown value 'fid'; did you mean 'fd'?"),
    ("optimizer.lrr=1",
     "optimizer.lrr: adamw has no such setting; did you mean 'lr'?"),
    ("optimizer.lr=fast",
     'optimizer.lr: must be a number, got "fast"'),
    ("optimizer.lr=.nan",
     "optimizer.lr: must be a finite number, got NaN"),
    ("train.compile=yes",
     'train.compile: must be true or false, got "yes"'),
    ("colour=red",
     "colour: unknown key; known here: name, output, seed, data, model, flow, optimizer, train, "
     "sample, evaluate, compare"),
    ("lr=3",
     "lr: unknown key; did you mean 'optimizer.lr'?"),
    ("steps=3",
     "steps: unknown key; did you mean 'train.steps' or 'sample.solver.steps'?"),
    ("solver=euler",
     "solver: unknown key; did you mean 'sample.solver'?"),
    ("model.patchsize=2",
     "model.patchsize: dit has no such setting; did you mean 'patch_size'?"),
    ("model.size=xl",
     "model.size: unknown value 'xl'; did you mean 'XL'?"),
    ("model.name=mlp",
     "model.name: unknown name 'mlp'; choose one of dit, unet, own"),
    ("data.name=digitz",
     "data.name: unknown value 'digitz'; did you mean 'digits'?"),
    ("data.name=qqq",
     "data.name: unknown value 'qqq'; choose one of digits, mnist, fashion_mnist, cifar10, "
     "cifar100, folder, zip, tar, latents, own"),
    ("optimizer=Muon",
     "optimizer.name: unknown name 'Muon'; did you mean 'muon'?"),
    ("optimizer.name=dopr_muon",
     "optimizer.name: unknown name 'dopr_muon'; did you mean 'dopr-muon'?"),
    ("sample.solver.grid=fast",
     "sample.solver.grid.name: unknown name 'fast'; choose one of uniform, edm, shifted, list"),
    ("optimizer.dopr.gamma=3",
     "optimizer.dopr.gamma: unknown key; known here: damping, cov_decay, refresh_every, form, "
     "power, max_rows, max_side, conv_mode, pc_gradient, rules"),
    ("optimizer.dopr=true",
     "optimizer.dopr: must be a mapping such as {damping: ...}, got true"),
    ("sample.guidance=2",
     "sample.guidance: must be a mapping such as {scale: ...}, got 2"),
    ("evaluate.weights=best",
     'evaluate.weights: must be ema, raw, own, ema-DECAY, power-LENGTH or posthoc-LENGTH, got '
     '"best"'),
    ("optimizer=outside",
     "optimizer.class_path: missing; this setting has no default"),
    ("optimizer={name: outside, class_path: os.system}",
     "optimizer.class_path: must be PACKAGE.CLASS with one of the packages torch.optim, "
     'schedulefree, prodigyopt, pytorch_optimizer, heavyball, got "os.system"'),
    ("optimizer={name: outside, class_path: torch.hub.load}",
     "optimizer.class_path: must be PACKAGE.CLASS with one of the packages torch.optim, "
     'schedulefree, prodigyopt, pytorch_optimizer, heavyball, got "torch.hub.load"'),
    ("optimizer={name: outside, class_path: schedulefree.A, betas: [0.9, 0.99]}",
     "optimizer.betas: outside has no such setting; it has lr, weight_decay, dopr, class_path, "
     "options"),
    ("train.ema_decays=[]",
     "train.ema_decays and train.ema_lengths are both empty: give one"),
    ("name=../escape",
     "name: must be of A-Z, a-z, 0-9, '.', '_' and '-', and begin with a letter or digit; '/' "
     'goes between folders, got "../escape"'),
    ("name=a/../../escape",
     "name: must be of A-Z, a-z, 0-9, '.', '_' and '-', and begin with a letter or digit; '/' "
     'goes between folders, got "a/../../escape"'),
    ("seed=99999999999999999999",
     "seed: must be a whole number, got 1e+20"),
    ("compare={arms: [{name: <b>, lrs: [1]}]}",
     "compare.arms.0.name: must be of A-Z, a-z, 0-9, '.', '_' and '-', and begin with a letter "
     'or digit, got "<b>"'),
    ("compare={arms: [{name: a, lrs: [1], st: 3}]}",
     "compare.arms.0.st: unknown key; did you mean 'set'?"),
    ("compare={arms: []}",
     "compare.arms: must have at least 1 item, not 0, got []"),
    ("optimizer.dopr.rules=[{patern: x}]",
     "optimizer.dopr.rules.0.patern: unknown key; did you mean 'pattern'?; "
     "optimizer.dopr.rules.0.pattern: missing; this setting has no default"),
    ("optimizer.dopr.rules=[{pattern: (}]",
     'optimizer.dopr.rules.0.pattern: not a regular expression (unclosed group), got "("'),
    ("optimizer.dopr.rules=[{pattern: '(?!x)'}]",
     "optimizer.dopr.rules.0.pattern: not a regular expression (look-around, including "
     'look-ahead and look-behind, is not supported), got "(?!x)"'),
    ("train.accumulation_steps=3",
     "train.global_batch_size 8 is not a multiple of train.accumulation_steps 3"),
]
# fmt: on


def line_of(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(("right", "wrong", "line"), IN_A_FILE)
def test_a_mistake_in_a_file(tmp_path, right, wrong, line):
    path = tmp_path / "config.yaml"
    path.write_text(SMALL.replace(right, wrong))
    assert line_of(path) == f"{path}: {line}"


@pytest.mark.parametrize(("override", "line"), OVERRIDES)
def test_a_mistake_in_an_override(tmp_path, override, line):
    path = tmp_path / "config.yaml"
    path.write_text(SMALL)
    assert line_of(path, override) == f"override {override!r}: {line}"
