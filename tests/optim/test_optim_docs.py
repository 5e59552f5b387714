"""docs/optim.md says of every option of DoPr what its default is."""

import inspect
import re
from pathlib import Path

import pytest

from flowdopr.optim import DoPr

TEXT = (Path(__file__).parents[2] / "docs" / "optim.md").read_text()
OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(DoPr).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_explained_with_its_default(name):
    entry = re.search(rf"^- `{name}`(?: \(([^)]*)\))?:(.*)$", TEXT, re.MULTILINE)
    assert entry, f"docs/optim.md has no entry for {name}"
    if entry[1] is not None:
        assert entry[1] == str(OPTIONS[name])
    elif OPTIONS[name] not in (None, ()):
        assert f"`{OPTIONS[name]}`" in entry[2]
