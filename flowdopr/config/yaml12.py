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
from yaml.reader import ReaderError

DEEPEST = 20  # mappings and lists inside each other; the schema needs 6
LONGEST = 100_000  # characters, which take a second to read; a large study has 20,000
NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

REMEDIES = {  # for what PyYAML says
    "found character '\\t'": "indent by spaces instead of tabs",
    "that cannot start any token": "put the text in quotes",
    "mapping values are not allowed": "quote text that holds ': ', or see whether the line before "
    "lacks its ': '",
    "expected <block end>": "indent this line as its neighbours, or double the quotes inside text",
    "stream end": "close the bracket or the quote",
    "end of stream": "close the quote",
}


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
        elif odd := NO_TEXT.search(getattr(event, "value", "")):
            message = f"the text holds {odd[0]!a}, which no setting takes; remove it"
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


_FLOAT = (
    r"[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\d{19,}|\.inf|\.nan)"
)
_Loader.yaml_implicit_resolvers = {}
for tag, pattern in {
    "null": r"~|null|",
    "bool": r"true|false",
    "int": r"[-+]?(?:0|[1-9][0-9_]{0,17})",  # more digits, which 64 bits may not hold, are a float
    "float": _FLOAT,
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the words that `_Loader` would otherwise take for numbers."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def parse_yaml(text: str | bytes) -> Any:
    """The value that `text` describes, bytes in UTF-8.

    Raises:
        ValueError: `text` is longer than `LONGEST`, is not UTF-8 or not valid YAML, or gives a key
            twice; one line with the place.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST:,} characters")
    try:
        return yaml.load(text.decode() if isinstance(text, bytes) else text, Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text; save it as UTF-8") from error
    except ReaderError as error:
        odd = f"character {error.position + 1} is {chr(error.character)!a}"
        raise ValueError(f"{odd}, which YAML does not allow; remove it") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = str(error.problem or error.context)
        remedy = next((f"; {remedy}" for said, remedy in REMEDIES.items() if said in problem), "")
        raise ValueError(f"{place}{problem}{remedy}") from error


def dump_yaml(value: Any) -> str:
    """`value` as YAML text that `parse_yaml` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
