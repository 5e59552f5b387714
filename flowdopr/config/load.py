"""Strict loading of a YAML config: `base:` inheritance, dotted overrides, one-line errors.

    config = load_config("quickstart", ["optimizer.lr=1e-3"])

A config is a file, or the name of one that comes with flowdopr. A file's `base:` (a path relative
to the file, or such a name) is loaded first and the file is merged over it, mapping by mapping. A
section whose `name` changes starts afresh: its other settings belonged to the old name. An
optimizer that is named without `dopr` has none.

A dotted override replaces one setting. `section.name=NEW` keeps the section's settings that differ
from the old name's defaults; `section=NEW` starts afresh.

Short forms are written out while values are merged: a bare word is a section of that name
(`solver: rk4`), a list of numbers is a grid of times, `dopr-muon` is Muon with DoPr.
"""

from __future__ import annotations

import difflib
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from flowdopr.config.errors import ConfigError, complaints, cut
from flowdopr.config.schema import Config
from flowdopr.config.shipped import config_file, shipped
from flowdopr.config.types import Sections, choices, field_of, sections_in
from flowdopr.config.yaml12 import DEEPEST, LONGEST, dump_yaml, parse_yaml

DATA_ALONE = {"data", "evaluate"}  # sections of a file that is only a base of configs
MOST_BASES = 10  # files below one config
LONGEST_PATH = 1000  # characters
ROOT = (Config,)
Values = dict[str, Any]


def load_config(
    path: str | Path, overrides: Iterable[str] = (), *, follow_base: bool = True
) -> Config:
    """Read `path`, its bases and `overrides` (`a.b=value`, the value in YAML) into a Config.

    Args:
        path: a file, or the name of a config that comes with flowdopr, such as "quickstart".
        follow_base: False refuses a `base`, for a file that somebody else may have written: it must
            not open others.

    Raises:
        ConfigError: a file is missing or is not YAML, or a key, type or range is wrong.
    """
    path = config_file(path)
    return _resolved(_read(path, () if follow_base else None), overrides, str(path))


def read_config(
    source: Config | Mapping[str, Any] | str | Path,
    overrides: Iterable[str] = (),
    *,
    follow_base: bool = True,
) -> Config:
    """The config that `source` is or names, with `overrides`.

    Args:
        source: a Config, a mapping of what a file has (also `base`), or as for `load_config`.
        follow_base: as for `load_config`.

    Raises:
        ConfigError: as `load_config`.
    """
    if isinstance(source, Config):
        return apply_overrides(source, overrides)
    if isinstance(source, str | Path):
        return load_config(source, overrides, follow_base=follow_base)
    place = Path("config")  # what messages name; a base is relative to the working directory
    try:
        values = json.loads(json.dumps(dict(source), default=os.fspath))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{place}: {error}; give what a YAML file can hold") from None
    return _resolved(_based(values, place, () if follow_base else None), overrides, str(place))


def load_data_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Like `load_config`, for work on the data alone: only the section `data` is required.

    Raises:
        ConfigError: as `load_config`.
    """
    overrides = list(overrides)
    for override in overrides:
        if not override.startswith(("data.", "data=")):
            raise ConfigError(f"{_named(override)}: only data.* is used here; remove it")
    unused = {"name": "data", "model": {"name": "dit"}}
    unused["train"] = {"steps": 1, "global_batch_size": 1}
    path = config_file(path)
    return _resolved(unused | _read(path, ()), overrides, str(path))


def apply_overrides(config: Config, overrides: Iterable[str], place: str = "overrides") -> Config:
    """A copy of `config` with `overrides` (`a.b=value`) applied.

    Args:
        place: what a message names for an error that no single override caused.

    Raises:
        ConfigError: as `load_config`.
    """
    return _resolved(to_dict(config), overrides, place)


def effective(config: Config) -> Config:
    """`config` with the numbers that its relative settings stand for, as the record of a run: a
    later change of `optimizer.lr` or `train.steps` does not change them any more."""
    config = with_damping_in_steps(config)
    optimizer = config.optimizer
    if getattr(optimizer, "adamw_lr", 0) is not None:
        return config
    changed = optimizer.model_copy(update={"adamw_lr": optimizer.lr})
    return config.model_copy(update={"optimizer": changed})


def with_damping_in_steps(config: Config) -> Config:
    """`config` with the schedule of `optimizer.dopr.damping` in steps, not in a share of them."""
    dopr = getattr(config.optimizer, "dopr", None)
    if dopr is None or not isinstance(dopr.damping, tuple) or dopr.damping[2] > 1:
        return config
    first, last, share = dopr.damping
    damping = (first, last, max(2, round(share * config.train.steps)))
    changed = {"dopr": dopr.model_copy(update={"damping": damping})}
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update=changed)})


def to_dict(config: Config) -> Values:
    """The whole config as plain YAML values."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """The whole config, defaults included, as YAML that `load_config` reads back equal."""
    return dump_yaml(to_dict(config))


def _read(path: Path, opened: tuple[Path, ...] | None) -> Values:
    """The settings of the file at `path` over those of its bases; `opened` files led here, None if
    the file may have no base."""
    return _based(_parsed(path, opened), path, opened)


def _based(values: Values, path: Path, opened: tuple[Path, ...] | None) -> Values:
    """`values` of the file at `path` over those of its bases."""
    below, base = {}, values.pop("base", None)
    if base is not None:
        below = _read(*_base(path, base, opened))
    try:
        return _merge(below, values, ROOT)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _base(path: Path, base: Any, opened: tuple[Path, ...] | None) -> tuple[Path, tuple[Path, ...]]:
    """The file that `base: ...` in the file at `path` names, and the files that led there."""
    problem = ""
    if not isinstance(base, str):
        problem = f"must be the path of one file, got {cut(repr(base), 200)}"
    elif len(base) > LONGEST_PATH:
        problem = f"a path of {len(base):,} characters, more than {LONGEST_PATH:,}: {cut(base)}"
    elif opened is None:
        problem = f"this file must stand alone; write what {base} has into it"
    elif len(opened) == MOST_BASES:
        problem = f"{base} leads back to an earlier file, or there are more than {MOST_BASES} bases"
    if problem or opened is None:
        raise ConfigError(f"{path}: base: {problem}")
    return config_file(base, path.parent), (*opened, path)


def _parsed(path: Path, opened: tuple[Path, ...] | None) -> Values:
    """The mapping in the file at `path`."""
    by = f" (base of {opened[-1]})" if opened else ""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            known = (path / name for name in ("config.yaml", "study.yaml"))
            inside = next((file for file in known if file.is_file()), "a YAML file")
            raise ValueError(f"it is a folder; give {inside}")
        if not stat.S_ISREG(mode):
            raise ValueError("it is not a regular file")  # a pipe or a device might never end
        with open(path, "rb") as file:
            values = parse_yaml(file.read(LONGEST + 1))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.as_posix(), shipped(), n=1)
        hint = f"did you mean '{near[0]}'?" if near else "`flowdopr configs` lists those it has"
        raise ConfigError(f"{path}: no such config file{by}; {hint}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read as a config{by}: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: a config is a mapping of sections, such as 'data:' and 'model:'"
        )
    return values


def _merge(values: Values, changes: Values, sections: Sections) -> Values:
    """`changes` over `values`, both mappings of settings of `sections`."""
    grid = changes.get("grid") if field_of(sections, "grid") else None
    times = grid.get("times") if isinstance(grid, dict) else grid
    if isinstance(times, list):  # a list of times has its own number of steps
        changes = {"steps": len(times) - 1} | changes
    merged = {
        key: _merge_value(values.get(key), value, field_of(sections, key))
        for key, value in changes.items()
    }
    return values | merged


def _merge_value(old: Any, new: Any, field: FieldInfo | None) -> Any:
    """`new` over `old` for one setting, without short forms and with the default name."""
    new = _written_out(new, field)
    if not isinstance(new, dict):
        return new
    if not isinstance(old, dict) or new.get("name", old.get("name")) != old.get("name"):
        default = getattr(field.default, "name", None) if field and choices(field) else None
        old = {"name": default} if default else {}
    return _merge(old, new, sections_in(field))


def _written_out(value: Any, field: FieldInfo | None) -> Any:
    """The value of a tagged section without short forms; other values are unchanged.

    Raises:
        ValueError: `dopr-muon` beside `dopr: null`.
    """
    tags = choices(field)
    if tags and isinstance(value, str):
        value = {"name": value}
    elif "list" in tags and isinstance(value, list):
        value = {"name": "list", "times": value}
    name = str(value.get("name")) if isinstance(value, dict) else ""
    plain = name.removeprefix("dopr-")
    if plain not in tags or "dopr" not in tags[plain].model_fields:
        return value
    if name == plain:
        return {"dopr": None} | value
    if value.get("dopr", {}) is None:
        raise ValueError(
            f"optimizer.name is {name} and optimizer.dopr is null: write name: {plain}"
        )
    return {"dopr": {}} | value | {"name": plain}


def _override(values: Values, override: str) -> Values:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys) or dotted.split() != [dotted] or len(keys) > DEEPEST:
        raise ConfigError(f"{_named(override)}: write section.key=value, without spaces")
    try:
        return _replace(values, keys, parse_yaml(text), ROOT)
    except ValueError as error:
        raise ConfigError(f"{_named(override)}: {error}") from None


def _named(override: str) -> str:
    """What a message calls an override."""
    return f"override {cut(repr(override), 200)}"


def _replace(values: Values, keys: Sequence[str], value: Any, sections: Sections) -> Values:
    """`values` of `sections` with `value` for the setting at the nested `keys`."""
    key, *rest = keys
    field, old = field_of(sections, key), values.get(key) or {}
    if rest and field is not None and "tuple" in str(field.annotation):
        raise ValueError(f"'{key}' is a list, which cannot be changed in part; set all of it")
    if rest and not isinstance(old, dict):
        raise ValueError(f"'{key}' is a value, not a section")
    if rest == ["name"] and choices(field):
        value = _renamed(old, value, field)
    elif rest:
        value = _replace(old, rest, value, sections_in(field))
    others = {other: setting for other, setting in values.items() if other != key}
    return _merge(others, {key: value}, sections)


def _renamed(old: Values, name: Any, field: FieldInfo | None) -> Values:
    """The tagged section `old` under another `name`: settings that differ from the defaults of the
    old name stay, and DoPr only where the new name asks for it."""
    new = _written_out({"name": name}, field)
    section = choices(field).get(str(old.get("name")))
    fields = section.model_fields if section else {}
    kept = {
        key: value
        for key, value in old.items()
        if key not in fields or value != to_jsonable_python(fields[key].default, fallback=repr)
    }
    if new.get("dopr") is None:
        kept.pop("dopr", None)
    return _merge(kept, new, sections_in(field))


def _resolved(values: Values, overrides: Iterable[str], place: str) -> Config:
    """The config of `values`, which came from `place`, after `overrides`."""
    states = [(place, values)]
    for override in overrides:
        states.append((_named(override), _override(states[-1][1], override)))
    if values.keys() <= DATA_ALONE and not {"model", "train"} & states[-1][1].keys():
        on_it = sorted(map(str, Path(place).parent.glob(f"{Path(place).stem}-*.yaml")))
        raise ConfigError(
            f"{place}: describes a data set alone; give a config that has it as its base"
            + (f", such as {on_it[0]}" if on_it else "")
        )
    config, wrong = _validated(states[-1][1])
    if config is not None:
        return config
    source_of, remaining = {}, set(wrong)
    for source, state in reversed(states):  # a line is from the state that it appears with
        remaining &= set(_validated(state)[1])
        source_of |= dict.fromkeys(remaining, source)
    by_source: dict[str, list[str]] = {}
    for line in wrong:
        by_source.setdefault(source_of[line], []).append(line)
    message = "; ".join(f"{source}: {'; '.join(lines)}" for source, lines in by_source.items())
    raise ConfigError(message)


def _validated(values: Values) -> tuple[Config | None, list[str]]:
    """The config of `values`, or what is wrong with them, one line for each setting."""
    try:
        # Through JSON, because pydantic's strict mode takes a list for a tuple only from there.
        return Config.model_validate_json(json.dumps(values)), []
    except ValidationError as error:
        return None, complaints(error, values)
