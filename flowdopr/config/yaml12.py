"""YAML text to plain Python values, safely, with YAML 1.2's idea of a number.

PyYAML follows YAML 1.1, where `1e-4` is a string, `no` is false, `1:30` is ninety and a key given
twice silently wins.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

DEEPEST = 20  # mappings and lists inside each other; the schema needs 6


class _Loader(yaml.SafeLoader):
    """SafeLoader without implicit dates, octals and yes/no; refuses keys given twice, tags (`!x`),
    anchors and aliases (`&x`, `*x`) and nesting deeper than `DEEPEST`."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        tag, anchor = getattr(event, "tag", None), getattr(event, "anchor", None)
        message = None
        if anchor or tag:
            what = f"an anchor or alias '{anchor}'" if anchor else f"a tag '{tag}'"
            message = f"{what} is not taken; write the value itself, in quotes if it is text"
        elif self.depth >= DEEPEST:
            message = f"more than {DEEPEST} mappings and lists inside each other"
        elif any("\ud800" <= letter <= "\udfff" for letter in getattr(event, "value", "")):
            message = "half of a surrogate pair, which is no character"
        if message:
            raise ComposerError(None, None, message, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                message = f"the key {key!r} is not a word; put it in quotes"
                raise ConstructorError(None, None, message, key_node.start_mark)
            if key in seen:
                message = f"the key '{key}' is given twice"
                raise ConstructorError(None, None, message, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _number(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(node.value).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_FLOAT = r"[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)"
_Loader.yaml_implicit_resolvers = {}
for tag, pattern in {
    "null": r"~|null|",
    "bool": r"true|false",
    "int": r"[-+]?(?:0|[1-9][0-9_]*)",
    "float": _FLOAT,
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the words that `_Loader` would otherwise take for numbers."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def parse_yaml(text: str) -> Any:
    """The value that `text` describes.

    Raises:
        ValueError: `text` is not valid YAML, or gives a key twice; one line with the place.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{place}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def dump_yaml(value: Any) -> str:
    """`value` as YAML text that `parse_yaml` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
