"""From a config to a finished run: devices, data, run folder, then the loop."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn

from flowdopr.config import Config, ConfigError
from flowdopr.data import DatasetInfo
from flowdopr.disk import locked
from flowdopr.flow import build_objective, build_sampling
from flowdopr.latents import build_datasets, load_decoder
from flowdopr.models import build_model
from flowdopr.optim import build_optimizer
from flowdopr.runs.averages import averages_of
from flowdopr.runs.folder import RunFolder
from flowdopr.runs.guide import load_guide
from flowdopr.runs.provenance import provenance
from flowdopr.train.log import run_log
from flowdopr.train.loop import Trainer
from flowdopr.train.signals import TrainingFailed


def train(config: Config, *, resume: bool = False, patience: float = 0.0) -> Path:
    """Train as `config` says and return the run folder, `<output>/<name>`.

    Runs on the devices and processes that accelerate finds.

    Args:
        resume: go on from the newest checkpoint, or start where there is none.
        patience: seconds to wait for another process that is at work on this run.

    Raises:
        ConfigError, ValueError: settings or data that cannot be used, or another process is at work
            on this run; nothing was trained.
        Interrupted: stopped by Ctrl-C or SIGTERM, after saving.
        TrainingFailed: the loss, or what layers are fed, is not finite.
    """
    accelerator = make_accelerator(config)
    with accelerator.main_process_first():
        datasets = build_datasets(config)
    model, optimizer = build_model_and_optimizer(config, datasets.info)
    run = RunFolder(Path(config.output) / config.name, config, datasets.info)
    with ExitStack() as held:
        if accelerator.is_main_process:
            run.check_place(config, datasets.info, resume=resume)
            remedy = "wait for it, or choose another folder by name=NEW"
            held.enter_context(locked(run.path, remedy, patience=patience))
            made_by = provenance(accelerator.device) | {"processes": accelerator.num_processes}
            run = RunFolder.create(config, datasets.info, made_by, resume=resume)
        accelerator.wait_for_everyone()
        held.enter_context(run_log(run.path / "log.txt" if accelerator.is_main_process else None))
        try:
            Trainer(config, accelerator, datasets, model, optimizer, run).fit()
        except FloatingPointError as error:  # DoPr met inputs that are not finite too often
            raise TrainingFailed(f"{run.path}: {error}") from None
        finally:
            accelerator.free_memory()
    return run.path


def build_model_and_optimizer(
    config: Config, dataset: DatasetInfo
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The seeded model and its optimizer, after all settings proved to fit together.

    Raises:
        ConfigError, ValueError: settings that do not; nothing has been written yet.
    """
    for check in (build_objective, build_sampling, averages_of):
        check(config)
    torch.manual_seed(config.seed)
    model = build_model(config, dataset.image_shape, dataset.num_classes)
    # What the sample grids will need must be there now, and not only after days of training.
    load_decoder(dataset.autoencoder)
    load_guide(config, dataset)
    return model, build_optimizer(model, **optimizer_arguments(config))


def optimizer_arguments(config: Config) -> dict[str, Any]:
    """Section `optimizer` as keyword arguments of `build_optimizer`."""
    settings = config.optimizer.model_dump()
    if settings.get("ns_dtype") is not None:
        settings["ns_dtype"] = getattr(torch, settings["ns_dtype"])
    return settings


def make_accelerator(config: Config) -> Accelerator:
    """The devices and processes of this launch.

    Raises:
        ConfigError: a precision the device lacks, a batch that does not divide, or a way of
            distributing that the trainer does not offer.
    """
    settings = config.train
    AcceleratorState._reset_state()  # an earlier run of this Python process may have left another
    try:
        # Told so, accelerate lets several processes without a GPU work together by gloo.
        cpu = not torch.accelerator.is_available()
        accelerator = Accelerator(mixed_precision=settings.precision, cpu=cpu)
    except ValueError as error:
        raise ConfigError(f"train.precision={settings.precision}: {error}") from None
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
    ):
        raise ConfigError(
            f"accelerate is configured for {accelerator.distributed_type.value}; "
            "the trainer runs on one process or on several by data parallelism (DDP)"
        )
    share = accelerator.num_processes * settings.accumulation_steps
    if settings.global_batch_size % share:
        raise ConfigError(
            f"train.global_batch_size {settings.global_batch_size} is not a multiple of "
            f"{accelerator.num_processes} processes x {settings.accumulation_steps} "
            "train.accumulation_steps"
        )
    return accelerator
