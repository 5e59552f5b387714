"""Strict loading of a YAML config: `base:` inheritance, dotted overrides, one-line errors.

    config = load_config("configs/quickstart.yaml", ["optimizer.lr=1e-3"])

A file's `base:` (a path beside the file) is loaded first and the file is merged over it, mapping by
mapping. A section whose `name` changes starts afresh: its other settings belonged to the old name.
Naming an optimizer says the whole of it: without `dopr` beside it there is none.

A dotted override changes one setting and nothing else. Of a section, `section.name=NEW` keeps what
was set to other values than the old name's defaults, and `section=NEW` starts afresh.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flowdopr.config.errors import Complaint, ConfigError, complaints
from flowdopr.config.schema import Config
from flowdopr.config.short import complete, expand, expand_value, renamed, steps_of
from flowdopr.config.types import choices, field_of, sections_in
from flowdopr.config.yaml12 import dump_yaml, parse_yaml

MOST_SHOWN = 5  # complaints in one message
ROOT = (Config,)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read `path`, its bases and `overrides` (`a.b=value`, the value in YAML) into a Config.

    Raises:
        ConfigError: a file is missing or is not YAML, or a key, type or range is wrong.
    """
    return _overridden(_read_merged(Path(path)), overrides, str(path))


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
    return _overridden(unused | _read_merged(Path(path)), overrides, str(path))


def apply_overrides(config: Config, overrides: Iterable[str], place: str = "overrides") -> Config:
    """A copy of `config` with `overrides` (`a.b=value`) applied.

    Args:
        place: what errors name that come from no single override.

    Raises:
        ConfigError: as `load_config`.
    """
    return _overridden(to_dict(config), overrides, place)


def to_dict(config: Config) -> dict[str, Any]:
    """The whole config as plain YAML values."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """The whole config, defaults included, as YAML that `load_config` reads back equal."""
    return dump_yaml(to_dict(config))


def _read_merged(path: Path) -> dict[str, Any]:
    """The settings of the file at `path` over those of its bases, without short forms."""
    values: dict[str, Any] = {}
    for layer in _read(path, ()):
        values = complete(_merge(values, layer), ROOT)
    return values


def _read(path: Path, opened: tuple[Path, ...]) -> list[dict[str, Any]]:
    """The settings in the bases of `path`, from the lowest, and its own; `opened` led here."""
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
    try:
        values = expand(values, ROOT)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
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
            changed = "name" in value and value["name"] != old.get("name")
            merged[key] = value if changed else _merge(old, value)
        else:
            merged[key] = value
    return merged


def _apply(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    values = json.loads(json.dumps(values))  # a deep copy of plain values
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not all(dotted.split(".")):
            raise ConfigError(f"override '{override}': write section.key=value")
        try:
            _set(values, dotted.split("."), parse_yaml(text))
        except ValueError as error:
            raise ConfigError(f"override '{override}': {error}") from None
    return complete(values, ROOT)


def _set(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set the setting at `keys` in the nested mapping `values`; ValueError where it cannot be."""
    node, parent, sections, field = values, values, ROOT, None
    for key in keys[:-1]:
        field = field_of(sections, key)
        sections = sections_in(field)
        if node.get(key) is None:
            node[key] = {}
        parent, node = node, node[key]
        if not isinstance(node, dict):
            raise ValueError(f"'{key}' is a value, not a section")
    last = keys[-1]
    if field is not None and choices(field) and last == "name":
        given = expand_value({"name": value}, field)
        parent[keys[-2]] = _merge(renamed(node, field, given["name"]), given)
    else:
        node[last] = expand_value(value, field_of(sections, last))
        node.update(steps_of(node[last]))


def _overridden(values: dict[str, Any], overrides: Iterable[str], place: str) -> Config:
    """The config of `values` from `place`, after `overrides`."""
    overrides = list(overrides)
    changed = _apply(values, overrides)
    try:
        return _validated(changed)
    except ValidationError as error:
        found = complaints(error)
    lines_of_place = {complaint.line for complaint in _complaints(values)}
    by_place: dict[str, list[str]] = {}
    for complaint in found[:MOST_SHOWN]:
        override = _override_at(complaint.place, overrides)
        if override is None or complaint.line in lines_of_place:
            where = place
        else:
            where = f"override '{override}'"
        by_place.setdefault(where, []).append(complaint.line)
    said = "; ".join(f"{where}: {'; '.join(lines)}" for where, lines in by_place.items())
    more = len(found) - MOST_SHOWN
    raise ConfigError(f"{said}; and {more} more" if more > 0 else said)


def _validated(values: dict[str, Any]) -> Config:
    # Through JSON, because pydantic's strict mode takes a list for a tuple only from there.
    return Config.model_validate_json(json.dumps(values))


def _complaints(values: dict[str, Any]) -> list[Complaint]:
    try:
        _validated(values)
    except ValidationError as error:
        return complaints(error)
    return []


def _override_at(place: tuple[Any, ...], overrides: Sequence[str]) -> str | None:
    """The last override of what is at `place`: of itself, of a part of it or of all around it; else
    of the name of its section, else of anything in that section."""
    words = tuple(str(part) for part in place)
    keys = [(item, tuple(item.partition("=")[0].split("."))) for item in reversed(overrides)]
    for override, key in keys:
        if key[: len(words)] == words or words[: len(key)] == key:
            return override
    for length in range(len(words) - 1, 0, -1):
        section = words[:length]
        inside = [(override, key) for override, key in keys if key[:length] == section]
        named = [override for override, key in inside if key == (*section, "name")]
        if inside:
            return (named or [inside[0][0]])[0]
    return None
