"""What is wrong with a config, as lines that name the setting, the value and the remedy."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from flowdopr.config.schema import Config
from flowdopr.config.types import Section, Sections, choices, field_of, sections_in

MOST_SHOWN = 30  # wrong settings in one message; a file of another program may have thousands
IN_PLAIN_WORDS = {
    "Input should be a valid number": "must be a number",
    "Input should be a valid integer": "must be a whole number",
    "Input should be a valid boolean": "must be true or false",
    "Input should be a valid string": "must be text",
    "Input should be": "must be",
    "Tuple should have": "must have",
    " after validation": "",
}
Place = tuple[str | int, ...]  # keys and list indices, such as ("optimizer", "lr")


class ConfigError(ValueError):
    """A setting that cannot be used. The message is one line: place, value and remedy."""


class _Setting(NamedTuple):
    """The setting that an error is about: its schema if it has one, the section that may hold it
    (or several), and that section's alternatives by `name` if it belongs to a tagged union."""

    place: Place
    field: FieldInfo | None
    holders: Sections
    union: dict[str, type[Section]]


def complaints(error: ValidationError, values: dict[str, Any]) -> list[str]:
    """One line for each wrong setting of `values`, wrong keys first: they explain missing ones."""
    lines: dict[Place, str] = {}
    # pydantic counts only the valid items of a list, and so finds a list of wrong ones too short.
    wrong = [
        item
        for item in error.errors()
        if item["type"] != "too_short"
        or item.get("ctx", {}).get("actual_length") == len(item["input"])
    ]
    wrong.sort(key=lambda item: item["type"] != "extra_forbidden")
    for item in wrong[:MOST_SHOWN]:
        setting = _setting(item["loc"], item["type"] == "missing", values)
        lines.setdefault(setting.place, " ".join(_line(dict(item), setting).split()))
    more = [f"the first {MOST_SHOWN} of {len(wrong)} errors"] if len(wrong) > MOST_SHOWN else []
    return [*lines.values(), *more]


def cut(text: str, length: int = 60) -> str:
    """`text` with at most `length` characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def did_you_mean(word: str, known: Iterable[str], otherwise: str, prefix: str = "") -> str:
    """The remedy for an unknown `word`: the known one that is close to it, else all of them."""
    by_lower = {name.lower(): prefix + name for name in known}
    close = difflib.get_close_matches(word.lower().removeprefix(prefix), by_lower, n=1)
    if close:
        return f"; did you mean '{by_lower[close[0]]}'?"
    return f"; {otherwise} {', '.join(by_lower.values())}" if by_lower else ""


def _setting(loc: Place, missing: bool, values: Any) -> _Setting:
    """The setting at pydantic's `loc`, which has names of union members between the keys."""
    found = _Setting((), None, (), {})
    sections, union = (Config,), {}
    for word in loc:
        children: Any = dict(enumerate(values)) if isinstance(values, list) else values
        if not isinstance(children, dict) or not (
            word in children or (missing and word == loc[-1])
        ):
            continue
        values, place = children.get(word), (*found.place, word)
        if isinstance(word, int):
            found = found._replace(place=place)
            continue
        found = _Setting(place, field_of(sections, word), sections, union)
        tags = choices(found.field)
        name = str(values.get("name")) if isinstance(values, dict) else ""
        union = tags if name in tags else {}
        sections = (tags[name],) if union else sections_in(found.field)
    return found


def _line(error: dict[str, Any], setting: _Setting) -> str:
    kind, value = error["type"], error["input"]
    message = error["msg"].removeprefix("Value error, ")
    if not setting.place or (kind == "value_error" and isinstance(value, dict)):
        return message  # of a section, which names the settings that it is about
    dotted = cut(".".join(str(key) or "''" for key in setting.place), 200)
    tags = choices(setting.field)
    if kind == "extra_forbidden":
        problem = _unknown_key(setting, error["loc"][-2] if setting.union else "")
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
        first = next(_dotted_keys(sections_in(setting.field)), "key")
        problem = f"must be {names}a mapping such as {{{first}: ...}}, got {_shown(value)}"
    elif kind == "literal_error" and isinstance(value, str):
        known = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        problem = f"unknown value '{cut(value)}'{did_you_mean(value, known, 'choose one of')}"
    else:
        for said, plain in IN_PLAIN_WORDS.items():
            message = message.replace(said, plain)
        problem = f"{message}, got {_shown(value)}{_in_its_type(value, kind)}"
    return f"{dotted}: {problem}"


def _in_its_type(value: Any, kind: str) -> str:
    """The remedy for a value that is right but for its type, such as a number in quotes."""
    if kind == "string_type" and isinstance(value, int | float):
        return f'; write "{value}"'
    try:
        number = float(value) if kind in ("int_type", "float_type") else math.nan
    except (TypeError, ValueError):
        return ""
    if kind == "float_type" and math.isfinite(number):
        return f"; write {value} without quotes"
    return f"; write {number:.0f}" if number.is_integer() and abs(number) < 1e15 else ""


def _unknown_key(setting: _Setting, name: str) -> str:
    key, keys = str(setting.place[-1]), list(_dotted_keys(setting.holders))
    problem = f"{name} has no such setting" if name else "unknown key"
    if key in keys:
        section, _, inner = key.partition(".")
        return f"{problem} in a file; write {section}: {{{inner}: ...}}"
    ends = (f".{key}", f".{key.replace('_', '.')}")
    moved = [dotted for dotted in keys if "." in dotted and f".{dotted}".endswith(ends)]
    moved += [dotted for dotted in keys if dotted.endswith(f"_{key}")]
    if moved:
        either = "' or '".join(dict.fromkeys(moved[:2]))
        return f"{problem}; did you mean '{either}'?"
    own = [dotted for dotted in keys if "." not in dotted and (dotted != "name" or not name)]
    owners = [other for other, section in setting.union.items() if key in section.model_fields]
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
    word = name.lower().replace("dopr_", "dopr-")
    if with_dopr and word.startswith("dopr-"):
        prefix, known = "dopr-", with_dopr
    return f"unknown name '{cut(name)}'{did_you_mean(word, known, 'choose one of', prefix)}"


def _shown(value: Any) -> str:
    return cut(json.dumps(value, default=str))
