"""Write docs/settings.md, the reference of all settings: `python scripts/write_settings.py`.

The meaning of a setting comes from the schema (flowdopr/config), or, for the optimizers and DoPr,
from "Args:" in the docstring of the class or function that takes it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from flowdopr.config import Config, DoPrConfig
from flowdopr.config.optimizer import OptimizerSection
from flowdopr.config.types import Section, choices, names_of, sections_in
from flowdopr.optim import DoPr, Muon
from flowdopr.optim.build import OPTIMIZERS

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
INTRODUCTION = """# Settings

Every key of a YAML config, written by `python scripts/write_settings.py`. On the command line a key
is changed by `section.key=value`, with the value in YAML, in quotes where a shell would read it:
`"train.ema_decays=[0.99, 0.999]"`. A setting without default must be given.

Where a section depends on its `name`, the column "with name" says which names have the setting;
with any other name it is refused. The name alone is short for the section with its defaults:
`flow.path: cosine` is `flow.path: {name: cosine}`, a list of numbers as a solver's `grid` is
`{name: list, times: ...}`, and `dopr-muon` is `{name: muon, dopr: {}}`. In a file, a section whose
name changes from that of the file's `base` starts afresh, and an optimizer that is named without
`dopr` has no DoPr. On the command line `section=NAME` starts afresh, while `section.name=NAME`
keeps what was set to other values than the defaults.
"""


class Row(NamedTuple):
    """One setting: its dotted key, the names that have it, and its meaning."""

    key: str
    values: str
    default: str
    meaning: str


def settings_markdown() -> str:
    """The whole reference: one table a section."""
    parts = [INTRODUCTION, *_section("", "Top level", Config)]
    return "\n".join(parts)


def _section(prefix: str, title: str, section: type[Section]) -> list[str]:
    """The table of a section, then those of the sections within it."""
    rows = {_row(prefix, section, key, field): "" for key, field in section.model_fields.items()}
    inside = [
        part
        for key, field in section.model_fields.items()
        for part in _inside(f"{prefix}{key}", field)
    ]
    return [*_table(title, rows), *inside]


def _inside(key: str, field: FieldInfo) -> list[str]:
    """The tables of what the setting `key` holds, if it holds sections."""
    tags = choices(field)
    if not tags:
        listed = "[].".join([key, ""]) if "tuple" in str(field.annotation) else f"{key}."
        return [part for section in sections_in(field) for part in _section(listed, key, section)]
    names: dict[Row, list[str]] = {}
    deeper: dict[str, FieldInfo] = {}
    for name, section in tags.items():
        for inner, setting in section.model_fields.items():
            row = _row(f"{key}.", section, inner, setting)
            names.setdefault(row, []).append(f"`{name}`")
            if sections_in(setting):
                deeper[inner] = setting
    for row, having in names.items():
        if len(having) == len(tags):
            names[row] = ["all"]
    rows = {row: ", ".join(having) for row, having in names.items()}
    inside = [part for inner, field in deeper.items() for part in _inside(f"{key}.{inner}", field)]
    return [*_table(key, rows), *inside]


def _table(title: str, rows: dict[Row, str]) -> list[str]:
    """Markdown; the column of names is left out where no setting depends on one."""
    named = any(rows.values())
    head = ["key", *(["with name"] if named else []), "values", "default", "meaning"]
    lines = [f"\n## {title}\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, names in rows.items():
        cells = [f"`{row.key}`", *([names] if named else []), row.values, row.default, row.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _row(prefix: str, section: type[Section], key: str, field: FieldInfo) -> Row:
    return Row(prefix + key, _values(section, key), _default(field), _meaning(section, key, field))


def _meaning(section: type[Section], key: str, field: FieldInfo) -> str:
    """From the schema, else from the docstring of what takes the setting."""
    if field.description:
        return " ".join(field.description.split())
    if issubclass(section, OptimizerSection):
        recipe = OPTIMIZERS[names_of(section)[0]]
        said = first_line(recipe) if key == "name" else arguments_of(recipe).get(key, "")
        said = arguments_of(Muon).get(key, "") if said == "as in `Muon`." else said
    else:
        said = arguments_of(DoPr).get(key, "") if section is DoPrConfig else ""
    return (said[:1].upper() + said[1:]).replace("None", "null")


def first_line(function: Any) -> str:
    """The first paragraph of the docstring of `function`, on one line."""
    return " ".join(inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].split())


def arguments_of(function: Any) -> dict[str, str]:
    """The description of each argument in the docstring of `function`, under "Args:".

    >>> def f(a, b, c):
    ...     '''Add up.
    ...
    ...     Args:
    ...         a, b: two numbers,
    ...             which are added.
    ...         c: another.
    ...     '''
    >>> arguments_of(f)
    {'a': 'two numbers, which are added.', 'b': 'two numbers, which are added.', 'c': 'another.'}
    """
    lines = inspect.cleandoc(function.__doc__ or "").split("\n")
    found: dict[str, str] = {}
    if "Args:" not in lines:
        return found
    text = []
    for line in lines[lines.index("Args:") + 1 :]:
        if line and not line.startswith("    "):
            break
        text.append(line[4:])
    # An argument begins without indentation; names that do not fit on its line go on below.
    for entry in re.split(r"\n(?=\S)", "\n".join(text)):
        names, colon, said = " ".join(entry.split()).partition(": ")
        if colon and re.fullmatch(r"\w+(, \w+)*", names):
            found |= dict.fromkeys(names.split(", "), said)
    return found


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = to_jsonable_python(field.get_default(call_default_factory=True))
    if choices(field):
        return f"`{value['name']}`"
    if isinstance(value, dict):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _values(section: type[Section], key: str) -> str:
    """The type and range of a setting in words, from its JSON schema."""
    field = section.model_fields[key]
    if choices(field):
        return "a name, or a section"
    schema = section.model_json_schema()
    return _words(schema["properties"][key], schema.get("$defs", {}))


def _words(part: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in part:
        return "a section"
    if "anyOf" in part:
        return " or ".join(_words(option, definitions) for option in part["anyOf"])
    if "const" in part:
        return f"`{part['const']}`"
    if "enum" in part:
        return ", ".join(f"`{value}`" for value in part["enum"])
    kind = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`"}.get(
        part.get("type", ""), part.get("type", "any")
    )
    if part.get("type") == "array":
        items = part.get("items") or (part.get("prefixItems") or [{}])[0]
        return f"list of {_words(items, definitions)}"
    signs = (
        ("minimum", ">="),
        ("exclusiveMinimum", ">"),
        ("maximum", "<="),
        ("exclusiveMaximum", "<"),
    )
    limits = [f"{sign} {part[key]:g}" for key, sign in signs if key in part]
    return f"{kind} {', '.join(limits)}".strip()


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    DOCUMENT.write_text(settings_markdown(), encoding="utf-8")
    print(DOCUMENT)


if __name__ == "__main__":
    main()
