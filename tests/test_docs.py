"""The documents are true: the table of imports, the paths they name, the Python they show."""

import re

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


def test_where_ten_things_are():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Where is it?")[2].partition("\n## ")[0]
    paths = re.findall(r"`([\w./]+)`", section)
    assert len(paths) >= 10
    for path in paths:
        assert (ROOT / path).is_file(), path


def test_files_that_the_page_on_architecture_names_exist():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", text):
        assert any((root / path).exists() for root in (ROOT, PACKAGE)), path


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


def test_the_python_of_the_page_on_pc_layers_runs():
    text = (DOCS / "pc-layer.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(compile(block, "docs/pc-layer.md", "exec"), names)
    assert list(names["model"].state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_commands_quote_what_a_shell_would_read():
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob("sample/*.md"),
        *DOCS.glob("*.md"),
        *ROOT.glob("configs/**/*.yaml"),
    ]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    commands = re.findall(
        r"^(?:#? *|.*&& )(flowdopr (?:train|sample|evaluate|compare|encode) .*)", text, re.M
    )
    assert len(commands) > 15
    for command in commands:
        assert not re.search(r"[][{}*?]", re.sub(r"\"[^\"]*\"|'[^']*'", "", command)), command
