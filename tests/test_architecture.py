"""The plan of docs/architecture.md, kept true: which part may import which."""

import ast
from pathlib import Path

import pytest
import yaml

from flowdopr.config import yaml12

PACKAGE = Path(__file__).parent.parent / "flowdopr"
FILES = sorted(PACKAGE.rglob("*.py"))

# A part, which is a folder or a file of the package, may import these parts and itself.
TOOLS = {
    "cpu",
    "disk",
    "exits",
    "linalg",
    "patterns",
    "pictures",
    "processes",
    "terminal",
    "callable_package",
}
MAY_IMPORT = {
    "config": {"patterns"},
    **{tool: set() for tool in TOOLS},
    "disk": {"exits"},
    "optim": {"cpu", "linalg", "patterns"},
    "flow": {"config", "linalg"},
    "models": {"config", "cpu", "linalg", "patterns"},
    "data": {"config", "disk", "exits", "terminal"},
    "runs": {"config", "disk", "data", "models"},
    "latents": {"config", "data", "models", "runs", *TOOLS},
    "train": {"config", "optim", "flow", "models", "data", "runs", "latents", *TOOLS},
    "evaluate": {"config", "flow", "models", "data", "runs", "latents", *TOOLS},
    "compare": {"config", "data", "runs", "latents", "train", "evaluate", *TOOLS},
    "export": {"config", "models", "runs", "evaluate", "disk"},
    "commands": {
        "exits",
        "terminal",
        "config",
        "latents",
        "train",
        "evaluate",
        "compare",
        "export",
    },
    "api": {"config", "flow", "data", "runs", "latents", "train", "evaluate", "compare", *TOOLS},
    "cli": {"exits", "terminal", "commands"},
    "__main__": {"cli"},
    "__init__": {"api"},
}
# In parts that promise plain arguments, only these files see the Config.
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


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    here = part(path)
    for name in imports(path):
        other = name.split(".")[1]
        assert other == here or other in MAY_IMPORT[here], f"{here} imports {name}"
        if other == "config" and here in SEES_CONFIG:
            assert path.name in SEES_CONFIG[here], f"{path.name} sees the config"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_readable(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "every file says what it holds"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} does not fit on a screen"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_needs_unix(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)]
    names = {alias.name for node in nodes for alias in node.names}
    assert not names & {"fcntl", "grp", "pwd", "resource", "termios"}


def test_optim_stands_alone():
    """It needs torch, pydantic for patterns if any, and three files of ours that need nothing."""
    for path in (PACKAGE / "optim").rglob("*.py"):
        ours = {name for name in imports(path) if not name.startswith("flowdopr.optim")}
        assert ours <= {"flowdopr.cpu", "flowdopr.linalg", "flowdopr.patterns"}, path.name
    for name in ("cpu", "linalg", "patterns"):
        assert not imports(PACKAGE / f"{name}.py")


def test_dopr_knows_no_other_optimizer():
    """The optimizers of the package above are built on it, or wrapped by it; they have one base."""
    for path in (PACKAGE / "optim" / "dopr").glob("*.py"):
        ours = {name for name in imports(path) if not name.startswith("flowdopr.optim.dopr")}
        known = {f"flowdopr.{name}" for name in ("cpu", "linalg", "patterns", "optim.base")}
        assert ours <= known, path.name


RUN_CODE = {
    *("eval", "exec", "__import__", "os.system", "os.popen", "yaml.full_load", "yaml.unsafe_load"),
    *(f"{name}.{call}" for name in ("pickle", "marshal") for call in ("load", "loads")),
    *("pickle.Unpickler", "shelve.open", "torch.jit.load", "torch.hub.load"),
}
ONLY_WITH = {"torch.load": "weights_only=True", "yaml.load": "Loader=_Loader"}
"""These may be called if they are told to read data alone."""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_can_run_code(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(
            node, ast.ImportFrom
        ):  # so that the names below are found where they are used
            assert node.module not in {"pickle", "marshal", "shelve"}
        if isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), [ast.unparse(one) for one in node.keywords]
            assert name not in RUN_CODE
            assert not {"shell=True", "allow_pickle=True"} & set(given)
            assert ONLY_WITH.get(name) in {None, *given}


def test_few_files_import_by_a_name_that_they_are_given():
    """Of our own modules, two extras, a list of packages, and what the user's environment lists."""
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                literal = isinstance(node.args[0], ast.Constant)
                found |= set() if literal else {path.relative_to(PACKAGE).as_posix()}
    files = {"__init__.py", "evaluate/pretrained.py", "optim/outside.py", "config/own.py"}
    assert found == files


def test_yaml_is_read_by_a_safe_loader():
    assert issubclass(yaml12._Loader, yaml.SafeLoader)
