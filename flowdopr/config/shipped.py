"""The configs that come with flowdopr, which a name without `.yaml` means: `recipes/sit-b2`."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
PLACES = (PACKAGE / "configs", PACKAGE.parent / "configs")
"""Where they are in an installed wheel, and in a checkout."""


def shipped() -> dict[str, Path]:
    """The file of each config that comes with flowdopr, by its name; those of accelerate aside."""
    folder = next((place for place in PLACES if place.is_dir()), PLACES[0])
    files = {*folder.rglob("*.yaml")} - {*folder.glob("accelerate/*")}
    return dict(sorted((f.relative_to(folder).with_suffix("").as_posix(), f) for f in files))


def config_file(path: str | Path, beside: Path = Path()) -> Path:
    """The file that `path`, relative to the folder `beside`, means: the one at this place, or else
    the config of this name that comes with flowdopr."""
    file = beside / Path(path).expanduser()
    return file if os.path.isfile(file) else shipped().get(Path(path).as_posix(), file)


def title(file: Path) -> str:
    """The first line of the comment at the top of a config file."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""
