"""What is wrong with a config, as lines that name the setting, the value and the remedy."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from flowdopr.config.optimizer import WithDoPr
from flowdopr.config.schema import Config
from flowdopr.config.types import Section, Sections, choices, field_of, sections_in

Place = tuple[Any, ...]


class ConfigError(ValueError):
    """A setting that cannot be used. The message is one line: place, value and remedy."""


class Complaint(NamedTuple):
    """`line` says what is wrong with the setting at `place`, such as ("optimizer", "lr")."""

    place: Place
    line: str


class _Spot(NamedTuple):
    """Where an error is: the setting's keys, the sections that hold it, their name in a tagged
    union with the other sections of that union, and the setting where the schema knows it."""

    place: Place
    holders: Sections
    tag: str | None
    siblings: dict[str, type[Section]]
    field: FieldInfo | None


def complaints(error: ValidationError) -> list[Complaint]:
    """One complaint a setting, wrong keys first: a wrong key explains a missing one."""
    found: dict[Place, tuple[str, Complaint]] = {}
    # Of the branches of a union, the first is the usual one: its error is the one to show.
    for item in reversed(error.errors()):
        spot = _spot(item["loc"], item["type"])
        line = " ".join(_line(spot, dict(item)).split())
        found[spot.place] = (item["type"], Complaint(spot.place, line))
    ordered = list(reversed(found.values()))
    ordered.sort(key=lambda pair: pair[0] != "extra_forbidden")
    return [complaint for _, complaint in ordered]


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """The remedy for an unknown `word`: the known one that is close to it, else all of them."""
    known = list(known)
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{by_lower[close[0]]}'?"
    return f"; {otherwise} {', '.join(known)}" if known else ""


def _spot(loc: Place, kind: str) -> _Spot:
    """The place of an error without pydantic's marks of a union."""
    place: list[Any] = []
    sections, holders = (Config,), ()
    tags, siblings, tag, field = {}, {}, None, None
    for number, part in enumerate(loc):
        if part in tags:
            sections, tag, siblings, tags = (tags[part],), part, tags, {}
            continue
        inner = field_of(sections, part)
        if inner is not None:
            place.append(part)
            holders, field = sections, inner
            sections, tags = sections_in(inner), choices(inner)
        elif isinstance(part, int) or (number == len(loc) - 1 and kind == "extra_forbidden"):
            place.append(part)
            holders, field = sections, None
        else:
            continue  # the mark of a union, such as "float"
        if number < len(loc) - 1 and not tags:
            tag = None
    return _Spot(tuple(place), holders, tag, siblings if tag else {}, field)


def _line(spot: _Spot, error: dict[str, Any]) -> str:
    kind, dotted = error["type"], ".".join(str(part) for part in spot.place)
    message = str(error["msg"]).removeprefix("Value error, ")
    if kind == "value_error" or not dotted:
        return message
    tags = choices(spot.field)
    if kind == "extra_forbidden":
        said = _unknown_key(spot)
    elif kind == "missing":
        said = "missing; this setting has no default"
    elif kind == "union_tag_invalid":
        dotted, said = f"{dotted}.name", _unknown_name(str(error["ctx"]["tag"]), spot.field)
    elif kind == "union_tag_not_found":
        dotted, said = f"{dotted}.name", f"missing; choose one of {', '.join(tags)}"
    elif kind in ("tuple_type", "list_type"):
        value = error["input"]
        remedy = f"; write [{value}]" if isinstance(value, str | int | float) else ""
        said = f"must be a list, got {_shown(value)}{remedy}"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        names = f"one of the names {', '.join(tags)}, or " if tags else ""
        said = f"must be {names}a mapping of settings, got {_shown(error['input'])}"
    elif kind == "literal_error" and isinstance(error["input"], str):
        known = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        said = f"unknown value '{error['input']}'"
        said += did_you_mean(error["input"], known, "choose one of")
    else:
        said = f"{message[0].lower()}{message[1:]}, got {_shown(error['input'])}"
    return f"{dotted}: {said}"


def _unknown_key(spot: _Spot) -> str:
    key = str(spot.place[-1])
    own = [name for section in spot.holders for name in section.model_fields]
    own = [name for name in own if not spot.tag or name != "name"]
    inside = [name for name in _dotted_keys(spot.holders) if "." in name]
    said = f"{spot.tag} has no such setting" if spot.tag else "unknown key"
    ends = (f".{key}", f".{key.replace('_', '.')}")
    if moved := [name for name in inside if f".{name}".endswith(ends)]:
        return f"{said}; did you mean '{moved[0]}'?"
    owners = [name for name, other in spot.siblings.items() if key in other.model_fields]
    if owners and (not own or len(owners) < 3):
        return f"{said}; it belongs to {' and '.join(owners)}"
    return said + did_you_mean(key, own, "it has" if spot.tag else "known here:")


def _dotted_keys(sections: Sections, prefix: str = "") -> list[str]:
    """The settings of `sections` and of the sections within them, by their dotted keys."""
    found: dict[str, None] = {}
    for section in sections:
        for key, field in section.model_fields.items():
            found[prefix + key] = None
            found |= dict.fromkeys(_dotted_keys(sections_in(field), f"{prefix}{key}."))
    return list(found)


def _unknown_name(name: str, field: FieldInfo | None) -> str:
    known = choices(field)
    prefix = "dopr-" if name.lower().startswith("dopr-") else ""
    if prefix:
        known = {tag: section for tag, section in known.items() if issubclass(section, WithDoPr)}
    plain = name.lower().removeprefix("dopr-")
    near = {tag: prefix + tag for tag in known}
    close = difflib.get_close_matches(plain, near, n=1, cutoff=0.6)
    if close:
        return f"unknown name '{name}'; did you mean '{near[close[0]]}'?"
    return f"unknown name '{name}'; choose one of {', '.join(near.values())}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
