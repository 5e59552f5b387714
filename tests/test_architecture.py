"""The plan of docs/architecture.md, kept true: who may import whom, and how large a file may be."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "flowdopr"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import these rooms of ours, and itself.
MAY_IMPORT = {
    "config": set(),
    "disk": set(),
    "products": set(),
    "optim": {"products"},
    "flow": {"config"},
    "models": {"config", "products"},
    "data": {"config", "disk"},
    "train": {"config", "disk", "optim", "flow", "models", "data"},
    "evaluate": {"config", "disk", "data", "flow", "models", "train"},
    "compare": {"config", "disk", "data", "train", "evaluate"},
    "exits": set(),
    "cli": {"exits", "config", "train", "evaluate", "compare"},
    "__main__": {"cli"},
    "__init__": set(),
}
# Of the trainer, evaluation may see only what a run left behind.
FROM_TRAIN = {f"flowdopr.train.{name}" for name in ("run_folder", "guide", "provenance", "log")}
# In rooms that promise plain arguments, only these files see the Config.
SEES_CONFIG = {"flow": {"build.py"}, "models": {"__init__.py"}}


def imports(path: Path) -> set[str]:
    """Dotted names of ours that a file imports, relative ones made absolute."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            base = ".".join(parts[: -node.level]) if node.level else ""
            found.add(".".join(word for word in (base, node.module) if word))
    return {name for name in found if name.split(".")[0] == "flowdopr" and "." in name}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    here = room(path)
    for name in imports(path):
        other = name.split(".")[1]
        assert other == here or other in MAY_IMPORT[here], f"{here} imports {name}"
        if here in ("evaluate", "compare") and other == "train":
            assert here == "compare" or name in FROM_TRAIN
        if other == "config" and here in SEES_CONFIG:
            assert path.name in SEES_CONFIG[here], f"{path.name} sees the config"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_readable(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "every file says what it holds"
    assert len(path.read_text().splitlines()) <= 300
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} does not fit on a screen"


def test_optim_stands_alone():
    """It needs torch, and one file of ours that needs nothing but torch."""
    for path in (PACKAGE / "optim").glob("*.py"):
        ours = {name for name in imports(path) if not name.startswith("flowdopr.optim")}
        assert ours <= {"flowdopr.products"}, path.name
