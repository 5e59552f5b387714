"""Regular expressions that settings hold, matched in linear time.

Python's `re` tries every way to match, so `(.*)*!` on a name of 40 letters takes years. pydantic's
engine is that of Rust, which has no look-around and no back-references, and does not. It is
imported for the first pattern, because the optimizers without patterns need torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache


def patterns_in(given: Sequence[str]) -> Sequence[str]:
    """Patterns as they are; of one alone, which Python would take for its letters, a list."""
    return [given] if isinstance(given, str) else given


@lru_cache
def finder(pattern: str) -> Callable[[str], bool]:
    """A function that says whether `pattern` occurs in a name.

    >>> finder("^blocks.[02]")("blocks.2.mlp")
    True

    Raises:
        ValueError: `pattern` is no regular expression, or one that this engine does not have.
    """
    if not pattern:  # of the layers that no rule matches
        return lambda name: True
    from pydantic_core import SchemaError, SchemaValidator, core_schema

    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern)).isinstance_python
    except SchemaError as error:
        reason = str(error).splitlines()[-1].strip().split(": ", 1)[-1].rstrip(".")
        raise ValueError(f"not a regular expression ({reason})") from None
