"""The strict loader: what it accepts, and the one line it says when it refuses."""

import pytest

from flowdopr.config import Config, ConfigError, apply_overrides, load_config, to_yaml
from flowdopr.config.types import sections_in
from flowdopr.config.yaml12 import dump_yaml, parse_yaml

SMALL = """
name: small
data: {name: digits}
model: {name: dit}
optimizer: {name: adamw, lr: 1e-3}
train: {steps: 10, global_batch_size: 8}
"""


@pytest.fixture
def write(tmp_path):
    def _write(text, name="config.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return _write


def refused(path, overrides=()):
    """The one line that loading ends with."""
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_defaults_fill_what_is_not_said(write):
    config = load_config(write(SMALL))
    assert config.optimizer.lr == 1e-3
    assert config.train.max_grad_norm == 1.0
    assert config.seed == 0


def test_resolved_yaml_reads_back_equal(write):
    config = load_config(write(SMALL), ["optimizer.betas=[0.9, 0.95]", "optimizer.eps=1e-8"])
    assert load_config(write(to_yaml(config), "again.yaml")) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-1.5e+3", -1500.0), (".5", 0.5), ("3", 3), ("no", "no"),
        ("on", "on"), ("true", True), ("null", None), ("", None), ("1:30", "1:30"),
        ("2020-01-02", "2020-01-02"), ("010", "010"), ("1_000", 1000), ("'1'", "1"),
    ],
)  # fmt: skip
def test_scalars(text, value):
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_dump_parses_back():
    values = {"a": 1e-05, "b": [1, 2.5, "no", None, True], "c": {"d": "1e-4"}}
    assert parse_yaml(dump_yaml(values)) == values


def test_base_is_merged_and_a_new_name_starts_afresh(write):
    write(SMALL + "seed: 3\n", "bases/base.yaml")
    child = write(
        "base: bases/base.yaml\nname: child\noptimizer: {name: muon}\ntrain: {steps: 20}\n"
    )
    config = load_config(child)
    assert (config.name, config.seed) == ("child", 3)
    assert (config.train.steps, config.train.global_batch_size) == (20, 8)
    assert config.optimizer.lr == 1e-4  # adamw's 1e-3 did not carry over to muon


def test_an_override_changes_one_value(write):
    config = load_config(write(SMALL), ["optimizer.name=muon", "train.max_grad_norm=null"])
    assert (config.optimizer.name, config.optimizer.lr) == ("muon", 1e-3)
    assert config.train.max_grad_norm is None
    assert apply_overrides(config, ["seed=7"]).seed == 7


def test_an_error_names_where_it_is_from(write):
    path = write(SMALL.replace("lr: 1e-3", "lrr: 1"))
    assert refused(path) == f"{path}: optimizer.lrr: adamw has no such setting; did you mean 'lr'?"
    assert refused(path, ["seed=3"]).startswith(f"{path}: optimizer.lrr")
    both = refused(path, ["seed=x", "train.stepz=4"])
    assert f"{path}: optimizer.lrr: " in both
    assert "override 'seed=x': seed: must be a whole number, got \"x\"" in both
    assert "override 'train.stepz=4': train.stepz: unknown key; did you mean 'steps'?" in both
    config = load_config(write(SMALL))
    with pytest.raises(ConfigError, match=r"^override 'seed=-1': seed: .* got -1$"):
        apply_overrides(config, ["seed=1", "seed=-1"])


def test_of_many_errors_thirty_are_shown(write):
    message = refused(write(SMALL), [f"train.a{number}=1" for number in range(30)])
    assert message.count("unknown key") == 30
    assert " of " not in message
    message = refused(write(SMALL), [f"train.a{number}=1" for number in range(47)])
    assert message.count("unknown key") == 30
    assert "the first 30 of 47 errors" in message


def test_wrong_files_are_one_line(write, tmp_path):
    assert "no such config file" in refused(tmp_path / "none.yaml")
    assert "line 2" in refused(write("a: 1\na: 2\n"))
    assert "given twice" in refused(write("train:\n  steps: 1\n  steps: 2\n"))
    assert "mapping of sections" in refused(write("- a\n- b\n"))
    assert "base of" in refused(write("base: gone.yaml\n"))
    assert "base: config.yaml leads back" in refused(write("base: config.yaml\n"))
    for number in range(12):
        write(f"base: {number + 1}.yaml\n", f"{number}.yaml")
    assert "or there are more than 10 bases" in refused(tmp_path / "0.yaml")
    assert "train: missing" in refused(write("name: a\ndata: {name: digits}\nmodel: {name: dit}\n"))
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "cannot be read" in refused(tmp_path / "latin.yaml")
    assert "not a word" in refused(write("1: a\n"))


def complaint(config, override):
    try:
        apply_overrides(config, [override])
    except ConfigError as error:
        return str(error)
    return None


def dotted_keys(sections, prefix=""):
    for section in sections:
        for key, field in section.model_fields.items():
            yield prefix + key
            if "tuple" not in str(field.annotation):
                yield from dotted_keys(sections_in(field), f"{prefix}{key}.")


def test_any_value_of_any_setting_is_taken_or_refused_in_one_line(write):
    config = load_config(write(SMALL))
    keys = list(dict.fromkeys(dotted_keys([Config])))
    assert len(keys) > 120
    for key in keys:
        for value in ("null", "[]", "{}", "3", "x", "[1]", "{name: 1}", "{name: [x]}", "true"):
            said = complaint(config, f"{key}={value}")
            assert said is None or (key.split(".")[0] in said and "\n" not in said)


def test_a_folder_is_answered_with_the_file_in_it(write, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    cannot = "cannot be read as a config: it is a folder; give"
    assert refused(empty) == f"{empty}: {cannot} a YAML file"
    for name in ("study.yaml", "config.yaml"):  # of a study, of a run
        write(SMALL, f"run/{name}")
        assert refused(tmp_path / "run").endswith(f"give {tmp_path / 'run' / name}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: !!python/object/apply:os.system [true]", "line 1, column 7: a tag '"),
        ("name: !!str 3", "a tag '"),
        ("name: ! x", "a tag '!' is not taken"),
        ("a: &x {b: 1}", "an anchor or alias 'x' is not taken"),
        ("a: *x", "an anchor or alias 'x' is not taken"),
        ("a: " + "[" * 5000, "more than 20 mappings and lists inside each other"),
        ("a: " + "{b: " * 100, "more than 20 mappings and lists inside each other"),
        ("? [a, b]\n: 1", "is not a word; put it in quotes"),
        ("? {a: 1}\n: 1", "is not a word; put it in quotes"),
        ("null: 1", "the key None is not a word"),
        ('"a\\nb": 1', r"line 1, column 1: the text holds '\n', which no setting takes; remove it"),
        ('name: "\\uD800"', r"the text holds '\ud800'"),
        ('output: "\\0"', r"the text holds '\x00'"),
        ("seed: " + "9" * 5000, "seed: must be a whole number, got Infinity"),
        ("a: b: c", "line 1, column 5: "),
        ("--- a\n--- b", "line 2"),
        ("a: \0", r"character 4 is '\x00', which YAML does not allow; remove it"),
        ("a: [" + "1, " * 40_000 + "]", "it is longer than 100,000 characters"),
        ("'': 1", ": '': unknown key; known here: name, "),
    ],
)
def test_yaml_that_no_config_needs_ends_in_one_line(write, text, words):
    message = refused(write(text))
    assert words in message
    assert len(message) < 500
