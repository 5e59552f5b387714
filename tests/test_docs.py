"""The documents are true: the table of imports, the paths they name, the Python they show."""

import re

import pytest
import torch
from test_architecture import MAY_IMPORT, PACKAGE, TOOLS
from torch import nn

ROOT = PACKAGE.parent
DOCS = ROOT / "docs"


def test_the_table_of_rooms_is_the_one_that_the_import_test_checks():
    rows = re.findall(
        r"^\| `([a-z_]+)(?:\.py|/)` \|[^|]*\| ([^|]*) \|$",
        (DOCS / "architecture.md").read_text(encoding="utf-8"),
        re.M,
    )
    table = {}
    for room, cell in rows:
        words = set(re.sub(r"\([^)]*\)", "", cell).replace(" ", "").split(",")) - {"nothing"}
        table[room] = words - {"tools"} | (TOOLS if "tools" in words else set())
    assert table == {room: MAY_IMPORT[room] for room in MAY_IMPORT if not room.startswith("__")}


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_named_files_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:[\w.]+/)+[\w.-]*)`", text)
    assert paths
    for path in paths:
        here = (ROOT / path, PACKAGE / path)
        assert "yours" in path or any(place.exists() for place in here), path


def test_the_python_of_the_page_on_optim_runs():
    text = (DOCS / "optim.md").read_text(encoding="utf-8")
    names = {
        "torch": torch,
        "model": nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)),
        "batches": torch.randn(3, 16, 4),
        "loss": lambda model, batch: model(batch).square().mean(),
    }
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/optim.md", "exec"), names)
    assert type(names["optimizer"].optimizer).__name__ == "Muon"
