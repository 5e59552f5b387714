"""README and the pages are true: README's Python runs, commands parse, files exist."""

import re
import shlex
from pathlib import Path

import pytest

from flowdopr.cli import run_command

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    page: page.read_text(encoding="utf-8")
    for page in [ROOT / "README.md", ROOT / "sample" / "README.md", *ROOT.glob("docs/**/*.md")]
}
RUN = "".join(PAGES[ROOT / name] for name in ("README.md", "sample/README.md", "docs/tour.md"))
COMMANDS = re.findall(r"^(?:.*&& )?(flowdopr .+)$", RUN, re.M)


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert blocks
    for block in blocks:
        names: dict = {}
        exec(compile(block, "README.md", "exec"), names)
        nothing_learned = names["y"].square().mean()  # the loss of an output of zero
        assert names["loss"] < 0.95 * nothing_learned


@pytest.mark.parametrize("command", [c for c in COMMANDS if " train " in c or " compare " in c])
def test_train_and_compare_commands_resolve(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert run_command([*shlex.split(command)[1:], "--print-config"]) == 0
    assert capsys.readouterr().out.startswith("name: ")


def test_linked_files_exist():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\((?!http|#)([^)]+)\)", text):
            assert (page.parent / link.partition("#")[0]).exists(), f"{page}: {link}"
    for name in re.findall(r"`(configs/[^`/]+\.yaml)`", TEXT):
        assert (ROOT / name).exists(), name


def test_two_commands_are_read_by_ci():
    assert len(re.findall(r"^pip install -e", TEXT, re.M)) == 2
