"""`check`: read every file of a data set completely, and name those that cannot be used."""

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from flowdopr.config import ConfigError, load_data_config
from flowdopr.data import SOURCES, check_all, open_sources
from flowdopr.data.labels import refuse_empty
from flowdopr.data.listing import suffix
from flowdopr.data.pixels import suffixes
from flowdopr.data.sources import Source, shown
from flowdopr.disk import file_sha256
from flowdopr.latents.notes import SPLITS, read_notes
from flowdopr.terminal import counting, print_line


def check(place: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """One line for each broken file of the data at `place`: a config, or a folder, ZIP or tar of
    images.

    Images are listed afresh and decoded as in training; shards of latents are compared with their
    checksums.

    Raises:
        ConfigError, ValueError: no such place, overrides of what is no config, no images there, or
            a data set that has no files of its own.
    """
    place = Path(place)
    if kind := _kind(place):
        if overrides:
            raise ConfigError(f"check: {overrides[0]}: '{shown(place)}' is no config to change")
        return _broken_images([SOURCES[kind](place, "check", afresh=True)])
    data = load_data_config(place, overrides).data
    if data.name == "latents":
        return _broken_shards(Path(data.root))
    if data.name not in SOURCES:
        raise ConfigError(f"check: data.name={data.name} has no files that are checked one by one")
    return _broken_images(open_sources(data, afresh=True))


def _kind(place: Path) -> str | None:
    """The `data.name` of what lies at `place`, None for a config."""
    if place.is_dir():
        images = any(file.is_dir() or suffix(file.name) in suffixes() for file in place.iterdir())
        return "folder" if images or not any(place.glob("*.tar")) else "tar"
    if place.suffix == ".tar":
        return "tar"
    return "zip" if zipfile.is_zipfile(place) else None


def _broken_images(sources: Iterable[Source]) -> list[str]:
    lines = []
    for source in sources:
        refuse_empty(source)
        found = check_all(source)
        counts = f"{len(found):,} of {len(source.names):,} images are broken"
        print_line("; ".join([f"{shown(source.root)}: {counts}", *source.remarks()]))
        lines += [f"{source.where(name)}: {found[name].reason}" for name in sorted(found)]
    return lines


def _broken_shards(root: Path) -> list[str]:
    shards = [shard for split in SPLITS for shard in getattr(read_notes(root).shards, split)]
    lines = []
    with counting("checking shards", len(shards)) as progress:
        for shard in shards:
            try:
                if file_sha256(root / shard.file) != shard.sha256:
                    lines.append(f"{shown(root / shard.file)}: not as it was written")
            except OSError as error:
                lines.append(f"{shown(root / shard.file)}: {error.strerror}")
            progress()
    print_line(f"{shown(root)}: {len(lines):,} of {len(shards):,} shards are broken")
    return lines
