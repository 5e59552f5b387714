"""Short forms of settings, written out once while a config is loaded.

A bare word stands for a section of that name (`solver: rk4`), a list of numbers for a grid of
times, and `dopr-muon` for Muon with DoPr.
"""

from __future__ import annotations

from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from flowdopr.config.optimizer import WithDoPr, expand_dopr
from flowdopr.config.types import Section, Sections, choices, field_of, sections_in

Values = dict[str, Any]


def expand(values: Values, sections: Sections) -> Values:
    """`values` of one of `sections` without short forms, at all depths.

    Raises:
        ValueError: a short form that contradicts what stands beside it.
    """
    return {key: expand_value(value, field_of(sections, key)) for key, value in values.items()}


def expand_value(value: Any, field: FieldInfo | None) -> Any:
    """The value of one setting without short forms."""
    tags = choices(field)
    if tags and isinstance(value, str):
        value = {"name": value}
    elif "list" in tags and isinstance(value, list):
        value = {"name": "list", "times": value}
    if not isinstance(value, dict):
        return value
    if any(issubclass(section, WithDoPr) for section in tags.values()):
        value = expand_dopr(value)
    value = expand(value, sections_in(field))
    return steps_of(value.get("grid")) | value


def steps_of(grid: Any) -> Values:
    """The number of steps that comes with a grid: for a list of times, that of its intervals."""
    times = grid.get("times") if isinstance(grid, dict) else None
    return {"steps": len(times) - 1} if isinstance(times, list) else {}


def complete(values: Values, sections: Sections) -> Values:
    """`values` with the default name of every tagged section that gives none."""
    completed = {}
    for key, value in values.items():
        field = field_of(sections, key)
        if field is not None and isinstance(value, dict):
            default = default_name(field)
            value = ({"name": default} if default else {}) | complete(value, sections_in(field))
        completed[key] = value
    return completed


def renamed(values: Values, field: FieldInfo, name: Any) -> Values:
    """The settings of a tagged section for another `name`: those that differ from the defaults of
    the old name stay, and DoPr where the new name can have it."""
    old = values.get("name", default_name(field))
    section, new = (choices(field).get(str(key)) for key in (old, name))
    if section is None or name == old:
        return values | {"name": name}
    kept = {key: value for key, value in values.items() if not _is_default(section, key, value)}
    if new is not None and issubclass(section, WithDoPr) and not issubclass(new, WithDoPr):
        kept.pop("dopr", None)
    return kept | {"name": name}


def default_name(field: FieldInfo) -> str | None:
    """The name that a tagged section has by default."""
    default = field.default if choices(field) else None
    return getattr(default, "name", None)


def _is_default(section: type[Section], key: str, value: Any) -> bool:
    field = section.model_fields.get(key)
    if field is None or field.is_required():
        return False
    return value == to_jsonable_python(field.get_default(call_default_factory=True))
