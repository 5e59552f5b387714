"""The base class of all sections, types of numbers, and functions that walk through the schema."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from flowdopr.patterns import finder

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]  # of a file or folder; may start by ~
NAMED = Field(discriminator="name")  # a union of sections, one chosen by its `name`


def text(pattern: str, meaning: str) -> AfterValidator:
    """Text that `pattern` matches as a whole; `meaning` is what a message says that it must be."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(meaning)
        return text

    return AfterValidator(check)


def _regular_expression(text: str) -> str:
    finder(text)
    return text


_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # cannot lead out of a folder
_LETTERS = "must be of A-Z, a-z, 0-9, '.', '_' and '-', and begin with a letter or digit"
Word = Annotated[str, text(_WORD, _LETTERS)]
Words = Annotated[str, text(f"{_WORD}(/{_WORD})*", f"{_LETTERS}; '/' goes between folders")]
Function = Annotated[
    str, text(r"\w+(\.\w+)*:\w+", "must be MODULE:FUNCTION, such as my_models:make")
]
_AVERAGES = "must be ema, raw, own, ema-DECAY, power-LENGTH or posthoc-LENGTH"
Weights = Annotated[str, text(r"ema|raw|own|(ema|power|posthoc)-.+", _AVERAGES)]
Pattern = Annotated[str, AfterValidator(_regular_expression)]


class Section(BaseModel):
    """A group of settings: unknown keys are errors, values keep their type, nothing changes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    def unused(self, dotted: str, why: str) -> None:
        """Refuse the setting `dotted` of this section, which `why` says does nothing.

        Raises:
            ValueError: it differs from its default.
        """
        key = dotted.rpartition(".")[2]
        value, default = getattr(self, key), type(self).model_fields[key].default
        if value != default:
            remedy = f"remove it, or set {dotted}={_shown(default)}"
            raise ValueError(f"{dotted}={_shown(value)} is not used {why}: {remedy}")


def _shown(value: Any) -> str:
    """A setting as YAML on one line; a section as its name."""
    value = to_jsonable_python(getattr(value, "name", value))
    return value if isinstance(value, str) else json.dumps(value)


Sections = tuple[type[Section], ...]


def names_of(section: type[Section]) -> tuple[str, ...]:
    """The names that a section of a tagged union stands for."""
    return get_args(section.model_fields["name"].annotation)


def choices(field: FieldInfo | None) -> dict[str, type[Section]]:
    """The sections that a tagged union chooses from, by `name`; {} for any other setting."""
    if field is None or field.discriminator is None:
        return {}
    return {name: section for section in sections_in(field) for name in names_of(section)}


def sections_in(field: FieldInfo | None) -> Sections:
    """Every section that a setting may hold, also inside a list or beside null."""
    return tuple(_sections(field.annotation)) if field is not None else ()


def _sections(annotation: Any) -> Iterable[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def field_of(sections: Sections, key: Any) -> FieldInfo | None:
    """The setting `key` of the first of `sections` that has it; None if none has it."""
    found = (section.model_fields.get(key) for section in sections)
    return next((field for field in found if field is not None), None)
