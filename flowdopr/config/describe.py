"""The settings reference, written from the schema itself so that it cannot be out of date."""

from __future__ import annotations

import json
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flowdopr.config.model import MODEL_SECTIONS
from flowdopr.config.schema import ArmConfig, Config

INTRODUCTION = """# Settings

Every key of a YAML config, from `flowdopr/config/schema.py`; written by
`python scripts/write_settings.py`. On the command line a key is changed by `section.key=value`,
with the value in YAML. A setting without default must be given.
"""


def settings_markdown() -> str:
    """One table a section: key, type and range, default, meaning."""
    parts = [INTRODUCTION, _table("", "Top level", Config)]
    for name, field in Config.model_fields.items():
        if name == "model":
            for kind, section in MODEL_SECTIONS.items():
                parts.append(_table("model.", f"model, when `model.name` is `{kind}`", section))
        elif (section := _section(field.annotation)) is not None:
            parts.append(_table(f"{name}.", name, section))
    parts.append(_table("", "An arm of `compare.arms`", ArmConfig))
    return "\n".join(parts)


def _section(annotation: Any) -> type[BaseModel] | None:
    candidates = (annotation, *get_args(annotation))
    classes = (item for item in candidates if isinstance(item, type))
    return next((item for item in classes if issubclass(item, BaseModel)), None)


def _table(prefix: str, title: str, section: type[BaseModel]) -> str:
    rows = [f"\n## {title}\n", "| key | values | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if section is Config and (name == "model" or _section(field.annotation)):
            continue
        values, meaning = _values(section, name), " ".join((field.description or "").split())
        row = (f"`{prefix}{name}`", values, _default(field), meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _values(section: type[BaseModel], name: str) -> str:
    """The type and range of a field in words, from its JSON schema."""
    schema = section.model_json_schema()
    return _words(schema["properties"][name], schema.get("$defs", {}))


def _words(part: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in part:
        return "section"
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
