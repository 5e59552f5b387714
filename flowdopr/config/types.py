"""The base class of all sections, types of numbers, and functions that walk through the schema."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NAMED = Field(discriminator="name")  # a union of sections, one chosen by its `name`
Weights = Annotated[str, Field(pattern=r"^(ema|raw|ema-.+|power-.+|posthoc-.+)$")]


class Section(BaseModel):
    """A group of settings: unknown keys are errors, values keep their type, nothing changes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    def changed(self, key: str) -> bool:
        """Whether the setting `key` differs from its default."""
        return getattr(self, key) != type(self).model_fields[key].default


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
