"""Strict loading of a YAML config: `base:` inheritance, dotted overrides, one-line errors.

    config = load_config("configs/quickstart.yaml", ["optimizer.lr=1e-3"])

A file's `base:` (a path beside the file) is loaded first and the file is merged over it, mapping by
mapping. A section whose `name` changes starts afresh: its other settings belonged to the old name.
A dotted override changes one value and nothing else.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from flowdopr.config.idle import idle_setting
from flowdopr.config.model import MODEL_SECTIONS
from flowdopr.config.schema import Config
from flowdopr.config.yaml12 import dump_yaml, parse_yaml


class ConfigError(ValueError):
    """A setting that cannot be used. The message is one line: place, value and remedy."""


def load_config(
    path: str | Path, overrides: Iterable[str] = (), *, resolved: bool = False
) -> Config:
    """Read `path`, its bases and `overrides` (`a.b=value`, the value in YAML) into a Config.

    Args:
        resolved: the file is what `to_yaml` wrote beside a run: a setting in it that does nothing
            was left over there, and is no error.

    Raises:
        ConfigError: a file is missing or is not YAML, a key, type or range is wrong, or a setting
            does nothing beside the others (`idle.py`).
    """
    layers, overrides = _read(Path(path), ()), list(overrides)
    config = _validate(_apply(reduce(_merge, layers, {}), overrides), str(path))
    _refuse_idle(config, [*([] if resolved else layers), _apply({}, overrides)], str(path))
    return config


def load_data_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """As `load_config`, for work on the data alone: only the section `data` must be there.

    Raises:
        ConfigError: as `load_config`.
    """
    unused = {
        "name": "data",
        "model": {"name": "dit"},
        "train": {"steps": 1, "global_batch_size": 1},
    }
    values = reduce(_merge, _read(Path(path), ()), {})
    return _validate(unused | _apply(values, overrides), str(path))


def apply_overrides(config: Config, overrides: Iterable[str], place: str = "overrides") -> Config:
    """A copy of `config` with `overrides` (`a.b=value`) applied; errors name `place`.

    Raises:
        ConfigError: as `load_config`; of the settings that do nothing, only overrides are refused.
    """
    overrides = list(overrides)
    changed = _validate(_apply(to_dict(config), overrides), place)
    _refuse_idle(changed, [_apply({}, overrides)], place)
    return changed


def to_dict(config: Config) -> dict[str, Any]:
    """The whole config as plain YAML values."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """The whole config, defaults included, as YAML that `load_config` reads back equal."""
    return dump_yaml(to_dict(config))


def _refuse_idle(config: Config, layers: list[dict[str, Any]], place: str) -> None:
    if line := idle_setting(config, layers):
        raise ConfigError(f"{place}: {line}")


def _read(path: Path, opened: tuple[Path, ...]) -> list[dict[str, Any]]:
    """The mappings of the bases of `path`, from the lowest, and its own; `opened` led here."""
    path = path.resolve() if opened else path
    if path.is_dir():
        inside = [path / name for name in ("config.yaml", "study.yaml") if (path / name).is_file()]
        remedy = f"give {inside[0]}" if inside else "give a YAML file"
        raise ConfigError(f"{path}: a folder is no config; {remedy}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        by = f" (base of {opened[-1]})" if opened else ""
        raise ConfigError(f"{path}: no such config file{by}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a config: {error}") from None
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: a config is a mapping of sections, such as 'data:' and 'model:'"
        )
    base = values.pop("base", None)
    if base is None:
        return [values]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: must be the path of one file, got {base!r}")
    target = (path.parent / base).resolve()
    if target in (*opened, path.resolve()):
        raise ConfigError(f"{path}: base: {base} leads back to a file that is already being read")
    return [*_read(target, (*opened, path.resolve())), values]


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            renamed = "name" in value and value["name"] != old.get("name")
            merged[key] = value if renamed else _merge(old, value)
        else:
            merged[key] = value
    return merged


def _apply(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    values = json.loads(json.dumps(values))  # a deep copy of plain values
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not all(dotted.split(".")):
            raise ConfigError(f"override '{override}': write section.key=value")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"override '{override}': {error}") from None
        *sections, key = dotted.split(".")
        node = values
        for section in sections:
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
            if not isinstance(node, dict):
                raise ConfigError(f"override '{override}': '{section}' is a value, not a section")
        node[key] = value
    return values


def _validate(values: dict[str, Any], place: str) -> Config:
    try:
        # Through JSON, because pydantic's strict mode takes a list for a tuple only from there.
        return Config.model_validate_json(json.dumps(values))
    except ValidationError as error:
        # Of the branches of a union, the first is the usual one: its error is the one to show.
        lines = dict(_one_line(dict(item)) for item in reversed(error.errors()))
        # A wrong key explains a missing one, so it comes first.
        first, *others = sorted(lines.values(), key=lambda line: "unknown key" not in line)
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigError(f"{place}: {first}{more}") from None


def _one_line(error: dict[str, Any]) -> tuple[str, str]:
    """The dotted place of a pydantic error, and the error as `section.key: what is wrong`."""
    location, section = _place(error["loc"], error["type"])
    dotted = ".".join(str(part) for part in location)
    message = " ".join(str(error["msg"]).removeprefix("Value error, ").split())
    if error["type"] == "value_error":
        return dotted, message
    if error["type"] == "extra_forbidden":
        said = f"unknown key{_did_you_mean(str(location[-1]), section)}"
    elif error["type"] == "missing":
        said = "missing; this setting has no default"
    elif error["type"].startswith("union_tag"):
        dotted, said = f"{dotted}.name", f"must be one of {', '.join(MODEL_SECTIONS)}"
    elif error["type"] in ("tuple_type", "list_type"):
        value = error["input"]
        remedy = f"; write [{value}]" if isinstance(value, str | int | float) else ""
        said = f"must be a list, got {_shown(value)}{remedy}"
    else:
        said = f"{message[0].lower()}{message[1:]}, got {_shown(error['input'])}"
    return dotted, f"{dotted}: {said}"


def _place(loc: tuple[Any, ...], kind: str) -> tuple[list[Any], type[BaseModel] | None]:
    """The keys of an error's location without pydantic's marks of a union, and the last section."""
    kept: list[Any] = []
    section: type[BaseModel] | None = Config
    inside: type[BaseModel] | None = None
    for number, part in enumerate(loc):
        last = number == len(loc) - 1
        if kept == ["model"] and part in MODEL_SECTIONS:
            section = inside = MODEL_SECTIONS[part]
        elif section is not None and part in section.model_fields:
            kept.append(part)
            inside = section
            section = _section_in(section.model_fields[part].annotation)
        elif isinstance(part, int) or (last and kind == "extra_forbidden"):
            kept.append(part)
            inside = section
    return kept, inside


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as `tuple[ArmConfig, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_section_in(inner) for inner in getattr(annotation, "__args__", ()))
    return next((section for section in found if section), None)


def _did_you_mean(key: str, section: type[BaseModel] | None) -> str:
    known = list(section.model_fields) if section else []
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known here: {', '.join(known)}" if known else ""


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
