"""The package as users install it: built, alone in an empty folder, and with torch alone."""

import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from flowdopr import __version__
from flowdopr.cli import run_command
from flowdopr.config import load_config, load_data_config, shipped, title
from flowdopr.config.shipped import PACKAGE
from flowdopr.runs import versions

ROOT = PACKAGE.parent
WITHOUT = """
import sys
sys.modules |= dict.fromkeys(sys.argv[1:])  # importing one of these fails
import torch
import flowdopr.optim as optim

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 1))
optimizer = optim.DoPr(optim.Muon(model, lr=0.02), model, damping=1.0)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(16, 4)).square().mean().backward()
    optimizer.step()
"""
SHORT = [
    *("train.steps=4", "train.warmup_steps=1", "train.validate_every=4", "train.sample_every=4"),
    *("evaluate.fid_num_images=64", "evaluate.gallery=0", "compare.seeds=[0]"),
]


def needed(package: str) -> set[str]:
    """The modules of the packages that `package` needs, extras aside."""
    lines = [line for line in metadata.requires(package) or () if "extra ==" not in line]
    names = {re.split(r"[^\w-]", line)[0].lower().replace("-", "_") for line in lines}
    modules = {"pyyaml": "yaml", "pillow": "PIL", "scikit_learn": "sklearn"}
    return {modules.get(name, name) for name in names}


def test_the_optimizers_need_torch_alone():
    absent = needed("flowdopr") - needed("torch") - {"torch"} | {"pydantic_core"}
    assert {"numpy", "pydantic", "torchvision", "yaml"} <= absent
    subprocess.run([sys.executable, "-c", WITHOUT, *absent], check=True, cwd=ROOT)


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch):
    with monkeypatch.context() as nothing_installed:
        nothing_installed.setattr(sys, "meta_path", [])
        found = versions()
    assert found == {"python": platform.python_version(), "flowdopr": __version__}


def test_a_torchvision_of_another_torch_is_named_in_one_line(tmp_path):
    (tmp_path / "torchvision.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist")'
    )
    done = subprocess.run(
        [sys.executable, "-m", "flowdopr", "train", "quickstart", f"output={tmp_path}"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    *waiting, line = done.stderr.splitlines()
    assert done.returncode == 2
    assert all("at work" in other for other in waiting)
    assert re.match(r"flowdopr: torch \S+ and torchvision \S+ do not fit together: install", line)


def test_every_config_is_listed_in_one_sentence(capsys):
    assert run_command(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped())
    assert "recipes/sit-xl2-dopr" in shipped()
    for file in shipped().values():
        assert title(file).endswith((".", "?")), file


@pytest.mark.parametrize("name", shipped())
def test_a_shown_config_is_the_same_from_any_folder(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(["configs", "show", name]) == 0
    text = capsys.readouterr().out
    Path("mine.yaml").write_text(text)
    Path("above.yaml").write_text(f"base: {name}\n")
    load = load_config if re.search("^(train|base):", text, re.M) else load_data_config
    assert load("mine.yaml") == load("above.yaml") == load(name)


def test_a_file_comes_before_a_config_of_its_name_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits-unet").mkdir()
    assert load_config("digits-unet").name == "digits-unet"
    Path("quickstart").write_text("base: digits-unet\nname: mine\n")
    assert load_config("quickstart").name == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quikstart"], "quikstart: no such config file; did you mean 'quickstart'?"),
        (["train", "else"], "else: no such config file; `flowdopr configs` lists those it has"),
        (["configs", "show", "zib"], "configs show zib: unknown; did you mean 'zip'?"),
    ],
)
def test_an_unknown_name_has_a_remedy(arguments, message, capsys):
    assert run_command(arguments) == 2
    assert capsys.readouterr().err == f"flowdopr: {message}\n"


BUILD = "import sys; from hatchling import build; print(getattr(build, sys.argv[1])(sys.argv[2]))"


def built(kind: str, source: Path, into: Path) -> Path:
    """The file that the build backend makes of `source`."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(into)]
    return into / subprocess.check_output(command, cwd=source, text=True).splitlines()[-1]


@pytest.mark.slow
def test_the_wheel_works_alone_in_an_empty_folder(tmp_path):
    """The wheel is built from the sdist, and sees this environment's packages but not flowdopr."""
    with tarfile.open(built("sdist", ROOT, tmp_path)) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for name in ("configs/quickstart.yaml", "docs/data.md", "tests/conftest.py", "CHANGELOG.md"):
        assert (source / name).is_file()
    wheel = built("wheel", source, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if not name.startswith("flowdopr")]

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    command = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*command, "install", "-q", "--no-index", "--no-deps", wheel], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([python, "-c", where], text=True).strip())
    (packages / "here.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")

    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {key: os.environ[key] for key in os.environ if key != "PYTHONPATH"}
    for arguments in (["configs"], ["compare", "quickstart", *SHORT]):
        subprocess.run(
            [python.with_name("flowdopr"), *arguments], cwd=empty, env=environment, check=True
        )
    assert {path.name for path in empty.iterdir()} == {"runs"}
    assert (empty / "runs" / "quickstart" / "report.html").is_file()
