"""The documents are true: the table of imports, the paths they name, the Python they show."""

import re
from pathlib import Path

import torch
from test_architecture import MAY_IMPORT, PACKAGE, TOOLS
from torch import nn

from flowdopr.cli import run_command

ROOT = PACKAGE.parent
DOCS = ROOT / "docs"


def test_the_table_of_parts_is_the_one_that_the_import_test_checks():
    rows = re.findall(
        r"^\| `([a-z_]+)(?:\.py|/)` \|[^|]*\| ([^|]*) \|$",
        (DOCS / "architecture.md").read_text(encoding="utf-8"),
        re.M,
    )
    table = {}
    for part, cell in rows:
        words = set(re.sub(r"\([^)]*\)", "", cell).replace(" ", "").split(",")) - {"nothing"}
        table[part] = words - {"tools"} | (TOOLS if "tools" in words else set())
    assert table == {part: MAY_IMPORT[part] for part in MAY_IMPORT if not part.startswith("__")}


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


def run_page(name: str, names: dict) -> dict:
    """`names` after the Python blocks of a page ran in it, one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, f"docs/{name}", "exec"), names)
    return names


def test_the_python_of_the_page_on_optim_runs():
    names = {
        "torch": torch,
        "model": nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)),
        "batches": torch.randn(3, 16, 4),
        "loss": lambda model, batch: model(batch).square().mean(),
    }
    assert type(run_page("optim.md", names)["optimizer"].optimizer).__name__ == "Muon"


def test_a_model_of_ones_own_is_trained_as_its_page_says():
    names = run_page("own-model.md", {})
    assert names["held_out"].mean < 1
    assert names["samples"].shape == (10, 1, 8, 8)


def test_a_model_and_data_of_ones_own_are_named_by_configs_as_their_pages_say(
    tmp_path, own_module, monkeypatch
):
    for page, module, factory in (
        ("data.md", "my_data", "odd_digits"),
        ("own-model.md", "my_models", "Net"),
    ):
        text = (DOCS / page).read_text(encoding="utf-8")
        (code, *_), (config,) = (
            re.findall(f"```{kind}\n(.*?)```", text, re.S) for kind in ("python", "yaml")
        )
        own_module(module, code)
        (tmp_path / "page.yaml").write_text(config)
        monkeypatch.setenv("FLOWDOPR_CODE", f"{module}:{factory}")
        assert f"FLOWDOPR_CODE={module}:{factory}" in text
        settings = ["train.steps=20", "train.warmup_steps=0", "train.global_batch_size=16"]
        assert run_command(["train", "page.yaml", *settings]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["mine", "odd"]


def test_an_optimizer_of_ones_own_is_used_as_its_page_says(tmp_path, capsys):
    names = run_page("own-optimizer.md", {})
    assert names["optimizer"].optimizer is not None
    assert names["loss"].isfinite()
    study = re.findall(r"```yaml\n(.*?)```", (DOCS / "own-optimizer.md").read_text(), re.S)[-1]
    (tmp_path / "mine.yaml").write_text(study)
    assert run_command(["compare", str(tmp_path / "mine.yaml"), "--print-config"]) == 0
    assert "class_path: pytorch_optimizer.Lion" in capsys.readouterr().out


def test_every_page_has_its_place_on_the_site():
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.glob("**/*.md"))


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
