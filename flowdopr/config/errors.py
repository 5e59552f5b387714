"""What is wrong with a config, as lines that name the setting, the value and the remedy."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from flowdopr.config.schema import Config
from flowdopr.config.types import Section, Sections, choices, field_of, sections_in

Place = tuple[str | int, ...]  # keys and list indices, such as ("optimizer", "lr")


class ConfigError(ValueError):
    """A setting that cannot be used. The message is one line: place, value and remedy."""


class _Holder(NamedTuple):
    """The sections that may hold a setting: one, chosen by `name` from `tags`, if that is known."""

    sections: Sections
    name: str
    tags: dict[str, type[Section]]


class _Setting(NamedTuple):
    """The setting that an error is about; `field` is None where the schema does not know it."""

    place: Place
    field: FieldInfo | None
    holder: _Holder


def complaints(error: ValidationError, values: dict[str, Any]) -> dict[Place, str]:
    """One line for each wrong setting of `values`, wrong keys first: they explain missing ones."""
    lines: dict[Place, str] = {}
    for item in sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden"):
        setting = _setting(item["loc"], item["type"] == "missing", values)
        lines.setdefault(setting.place, " ".join(_line(dict(item), setting).split()))
    return lines


def did_you_mean(word: str, known: Iterable[str], otherwise: str, prefix: str = "") -> str:
    """The remedy for an unknown `word`: the known one that is close to it, else all of them."""
    by_lower = {name.lower(): prefix + name for name in known}
    close = difflib.get_close_matches(word.lower().removeprefix(prefix), by_lower, n=1)
    if close:
        return f"; did you mean '{by_lower[close[0]]}'?"
    return f"; {otherwise} {', '.join(by_lower.values())}" if by_lower else ""


def _setting(loc: Place, missing: bool, values: Any) -> _Setting:
    """The setting at pydantic's `loc`, which has names of union members between the keys."""
    place: list[str | int] = []
    field, holder, skipped = None, _Holder((Config,), "", {}), ""
    inside = holder
    for word in loc:
        children: Any = dict(enumerate(values)) if isinstance(values, list) else values
        if word == skipped or not isinstance(children, dict):
            skipped = ""
        elif word in children or (missing and word == loc[-1]):
            place.append(word)
            values = children.get(word)
            if isinstance(word, str):
                field, holder = field_of(inside.sections, word), inside
                inside = _holder(field, values)
                skipped = inside.name
    return _Setting(tuple(place), field, holder)


def _holder(field: FieldInfo | None, value: Any) -> _Holder:
    """The sections that `value` of the setting `field` may be: one, where its name is known."""
    tags = choices(field)
    name = str(value.get("name")) if isinstance(value, dict) else ""
    if name in tags:
        return _Holder((tags[name],), name, tags)
    return _Holder(sections_in(field), "", {})


def _line(error: dict[str, Any], setting: _Setting) -> str:
    kind, value = error["type"], error["input"]
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error" or not setting.place:
        return message
    dotted, tags = ".".join(map(str, setting.place)), choices(setting.field)
    if kind == "extra_forbidden":
        problem = _unknown_key(str(setting.place[-1]), setting.holder)
    elif kind == "missing":
        problem = "missing; this setting has no default"
    elif kind == "union_tag_invalid":
        dotted, problem = f"{dotted}.name", _unknown_name(error["ctx"]["tag"], tags)
    elif kind == "union_tag_not_found":
        dotted, problem = f"{dotted}.name", f"missing; choose one of {', '.join(tags)}"
    elif kind in ("tuple_type", "list_type"):
        remedy = f"; write [{value}]" if isinstance(value, str | int | float) else ""
        problem = f"must be a list, got {_shown(value)}{remedy}"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        names = f"one of the names {', '.join(tags)}, or " if tags else ""
        problem = f"must be {names}a mapping of settings, got {_shown(value)}"
    elif kind == "literal_error" and isinstance(value, str):
        known = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        problem = f"unknown value '{value}'{did_you_mean(value, known, 'choose one of')}"
    else:
        problem = f"{message[0].lower()}{message[1:]}, got {_shown(value)}"
    return f"{dotted}: {problem}"


def _unknown_key(key: str, holder: _Holder) -> str:
    name, keys = holder.name, list(_dotted_keys(holder.sections))
    problem = f"{name} has no such setting" if name else "unknown key"
    ends = (f".{key}", f".{key.replace('_', '.')}")
    moved = [dotted for dotted in keys if "." in dotted and f".{dotted}".endswith(ends)]
    if moved:
        return f"{problem}; did you mean '{moved[0]}'?"
    own = [dotted for dotted in keys if "." not in dotted and (dotted != "name" or not name)]
    owners = [other for other, section in holder.tags.items() if key in section.model_fields]
    if owners and (not own or len(owners) < 3):
        return f"{problem}; it belongs to {' and '.join(owners)}"
    return problem + did_you_mean(key, own, "it has" if name else "known here:")


def _dotted_keys(sections: Sections, prefix: str = "") -> Iterator[str]:
    """The settings of `sections` and of the sections within them, by their dotted keys."""
    for section in sections:
        for key, field in section.model_fields.items():
            yield prefix + key
            yield from _dotted_keys(sections_in(field), f"{prefix}{key}.")


def _unknown_name(name: str, tags: dict[str, type[Section]]) -> str:
    prefix, known = "", list(tags)
    with_dopr = [tag for tag, section in tags.items() if "dopr" in section.model_fields]
    if with_dopr and name.lower().startswith("dopr-"):
        prefix, known = "dopr-", with_dopr
    return f"unknown name '{name}'{did_you_mean(name, known, 'choose one of', prefix)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
