"""`encode`: encode the images of a config into latents, the data set `data.name: latents`."""

from pathlib import Path

from accelerate import PartialState

from flowdopr.config import Config, ConfigError
from flowdopr.config.schema import USED_BY
from flowdopr.data import Datasets, build_image_datasets
from flowdopr.latents.autoencoder import Autoencoder
from flowdopr.latents.shards import Encoding, write_notes, write_shards
from flowdopr.linalg import full_float32
from flowdopr.processes import device_of, this_process
from flowdopr.runs import versions
from flowdopr.terminal import counting


def encode(
    config: Config,
    *,
    autoencoder: str,
    out: str | Path,
    kept: str = "posterior",
    dtype: str = "float16",
    shard_size: int = 8192,
    batch_size: int = 32,
) -> Path:
    """Encode both splits of `config.data` into the folder `out`, which is returned.

    Mirrored copies are encoded too if `data.horizontal_flip` is on. Existing shards are kept, so
    the same call continues an interrupted encoding; latents.json is written last. Under
    `accelerate launch` the shards are divided among the processes.

    Args:
        autoencoder: a folder in diffusers' format, or a name on the Hugging Face hub.
        kept: "posterior", from which each epoch draws new latents, or "mean".
        dtype: of the stored numbers: "float16" or "float32".
        shard_size, batch_size: images in a file, and images encoded together.

    Raises:
        ConfigError, ValueError: no autoencoder, images that it does not take, latents of another
            encoding in `out`, numbers too large for `dtype`.
    """
    out, state, data = Path(out), this_process(), config.data
    if data.name == "latents":
        raise ConfigError("encode: data.name=latents is encoded already; give the images' config")
    if min(shard_size, batch_size) < 1:
        raise ConfigError(f"encode: shard_size {shard_size}, batch_size {batch_size}: 1 or more")
    model = Autoencoder.from_pretrained(autoencoder)
    with state.main_process_first():
        datasets = build_image_datasets(data)
    settings = data.model_dump(
        exclude={"num_workers", "cache", "download", "autoencoder", "source_root"}
    )
    used = [key for key in ("root", "held_out_root") if data.name in USED_BY[key]]
    places = {key: settings[key] for key in used if settings[key]}
    encoding = Encoding(
        source=settings | {key: str(Path(place).resolve()) for key, place in places.items()},
        autoencoder=model.record(autoencoder),
        image_shape=model.latent_shape(datasets.info.image_shape),
        kept=kept,
        dtype=dtype,
        mirrored=data.horizontal_flip,
        shard_size=shard_size,
        batch_size=batch_size,
        num_workers=data.num_workers,
    )
    _write_share(out, datasets, model, encoding, state)
    state.wait_for_everyone()
    if state.is_main_process:
        write_notes(out, datasets, encoding, versions())
    state.wait_for_everyone()
    return out


def _write_share(
    out: Path, datasets: Datasets, model: Autoencoder, encoding: Encoding, state: PartialState
) -> None:
    """Encode and write the shards of this process."""
    device, rank, world = device_of(state), state.process_index, state.num_processes
    model.to(device)
    share = sum(len(span.images) for span in encoding.spans(datasets)[rank::world])
    with counting("encoding", share, shown=rank == 0) as progress, full_float32():
        write_shards(
            out,
            datasets,
            lambda x: model.posterior(x.to(device)),
            encoding,
            rank=rank,
            world_size=world,
            progress=progress,
        )
