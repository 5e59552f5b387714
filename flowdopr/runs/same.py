"""What makes two runs the same: the settings and the data that decide what the weights become."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from flowdopr.config import Config, ConfigError, effective, to_dict
from flowdopr.data import DatasetInfo

if TYPE_CHECKING:
    from flowdopr.runs.folder import RunFolder

# Settings that may change when a run is resumed: they do not change what the weights become.
FREE_ON_RESUME = (
    *("name", "output", "sample", "evaluate", "compare"),
    *("data.root", "data.held_out_root", "data.download", "data.num_workers", "data.cache"),
    "data.on_bad_image",  # which images are left is in the fingerprint
    *("data.autoencoder", "data.source_root"),
    *("data.factory", "data.options"),  # the images that they give are in the fingerprint
    *(f"train.{key}" for key in ("steps", "log_every", "validate_every", "sample_every")),
    *(f"train.{key}" for key in ("checkpoint_every", "keep_checkpoints", "keep_every")),
    *(f"train.{key}" for key in ("keep_best", "max_skipped_steps", "process_timeout", "trackers")),
)


def check_same_run(
    run: RunFolder, config: Config, dataset: DatasetInfo, *, changed_data: bool = False
) -> None:
    """Check that the weights of `run` come from the settings and the data given here.

    Args:
        changed_data: allow other images of the same shape and classes.

    Raises:
        ConfigError: names the first setting that differs, and both values.
    """
    if config.train.steps != run.config.train.steps and config.train.lr_decay != "constant":
        raise ConfigError(
            f"{run.path}: train.steps was {run.config.train.steps}, now {config.train.steps}: the "
            f"{config.train.lr_decay} learning rate depends on it, so the run cannot be resumed; "
            f"train on from its weights in a run of its own by name=NEW train.init_from={run.path}"
        )
    if other := other_setting(run.config, config):
        remedy = "choose another folder by name=NEW"
        if other.startswith("optimizer.dopr.damping was ["):  # perhaps a share of other train.steps
            kept = json.dumps(run.config.model_dump()["optimizer"]["dopr"]["damping"])
            remedy += f', or keep it by "optimizer.dopr.damping={kept}"'
        raise ConfigError(f"{run.path}: a run of another config is here: {other}; {remedy}")
    if dataset.fingerprint != run.dataset.fingerprint and not changed_data:
        raise ConfigError(
            f"{run.path}: the images in {config.data.place} are not those this run was trained on; "
            "give those, or go on with these by --resume --changed-data"
        )
    for key in ("image_shape", "class_names"):
        was, now = getattr(run.dataset, key), getattr(dataset, key)
        if was != now:
            raise ConfigError(
                f"{run.path}: the {key} of the data was {was}, now {now}; "
                "choose another folder by name=NEW"
            )


def other_setting(before: Config, now: Config) -> str | None:
    """The first setting that differs, of those that decide what the weights become, with both
    values; None if there is none."""
    old, new = (flat(to_dict(effective(given))) for given in (before, now))
    for key in sorted(old.keys() | new.keys()):
        free = any(key == name or key.startswith(name + ".") for name in FREE_ON_RESUME)
        if not free and old.get(key) != new.get(key):
            return f"{key} was {old.get(key)}, now {new.get(key)}"
    return None


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
