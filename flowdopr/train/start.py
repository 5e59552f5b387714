"""From a config to a finished run: devices, data, run folder, then the loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
    patch_environment,
)

from flowdopr.config import Config, ConfigError, effective, with_damping_in_steps
from flowdopr.data import DatasetInfo, check_start
from flowdopr.disk import locked
from flowdopr.exits import one_line
from flowdopr.flow import build_objective, build_sampling
from flowdopr.latents import build_datasets, load_decoder
from flowdopr.models import build_model
from flowdopr.optim import averages_itself, build_optimizer
from flowdopr.processes import asks_for_shards, check_launch, keep_freed_memory
from flowdopr.runs import (
    RunFolder,
    averages_of,
    begin_run,
    check_place,
    load_guide,
    load_initial,
    provenance,
)
from flowdopr.train.components import Components
from flowdopr.train.log import log_roles, run_log
from flowdopr.train.loop import Trainer
from flowdopr.train.shards import share_out
from flowdopr.train.signals import TrainingFailed
from flowdopr.train.trackers import check_trackers, tracking

log = logging.getLogger("flowdopr.train")


def train(
    config: Config, *, resume: bool = False, changed_data: bool = False, patience: float = 0.0
) -> Path:
    """Train as `config` says and return the run folder, `<output>/<name>`.

    Runs on the devices and processes that accelerate finds.

    Args:
        resume: continue from the newest checkpoint, or start if there is none.
        changed_data: continue on other images than before, of the same shape and classes.
        patience: seconds to wait for another process that is training this run.

    Raises:
        ConfigError, ValueError: settings or data that cannot be used, or another process is
            training this run; nothing was trained.
        Interrupted: stopped by Ctrl-C or a signal (docs/operations.md), after saving.
        TrainingFailed: values that are not finite, unreadable images, a checkpoint that fails.
    """
    config = effective(config)
    accelerator = make_accelerator(config)
    with accelerator.main_process_first():
        datasets = build_datasets(config)
    run = RunFolder(Path(config.output) / config.name, config, datasets.info)
    sharded = accelerator.num_processes > 1 and asks_for_shards()
    starts = config.train.init_from is not None and not run.newest_sound()[0]
    components = build_components(
        config, datasets.info, accelerator.device, starts=starts, sharded=sharded
    )
    with ExitStack() as held:
        if accelerator.is_main_process:
            allowed = {"resume": resume, "changed_data": changed_data}
            check_place(config, datasets.info, **allowed)
            unchecked = check_start(datasets)
            remedy = "wait for it, or choose another folder by name=NEW"
            held.enter_context(locked(run.path, remedy, patience=patience))
            held.enter_context(run_log(run.path / "log.txt"))
            for line in (datasets.summary(), *unchecked):
                log.info("%s", line)
            made_by = provenance(accelerator.device, config) | components.initial
            made_by |= {"processes": accelerator.num_processes, "data": datasets.info.fingerprint}
            run = begin_run(config, datasets.info, made_by, **allowed)
        else:
            held.enter_context(run_log(None))
        accelerator.wait_for_everyone()
        try:
            log_roles(config.name, components.model, components.optimizer, run.path / "log.txt")
            trainer = Trainer(config, accelerator, datasets, components, run)
            if trainer.step:
                done = trainer.step >= config.train.steps
                state = "already complete at" if done else "going on from"
                log.info("%s step %d", state, trainer.step)
            elif resume:
                log.info("no checkpoint in %s: training starts at step 0", run.path)
            with tracking(accelerator, run, trainer.step), _telling_of_killed_workers(run):
                trainer.fit()
            if missing := ", ".join(trainer.looks.missing):
                log.warning("%s: trained, but without %s", run.path, missing)
        finally:
            accelerator.free_memory()
    return run.path


@contextmanager
def _telling_of_killed_workers(run: RunFolder) -> Iterator[None]:
    """A block in which torch may raise, wherever a step is, that a worker process was killed."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TrainingFailed) or "DataLoader worker" not in str(error):
            raise
        raise TrainingFailed(
            f"{run.path}: a process that decodes images ended ({one_line(error)}); the newest "
            f"checkpoint is of step {max(run.steps(), default=0)}: go on with the same command "
            "and --resume, with a lower data.num_workers if memory ran out"
        ) from None


def build_components(
    config: Config,
    dataset: DatasetInfo,
    device: torch.device | str = "cpu",
    *,
    starts: bool = False,
    sharded: bool = False,
) -> Components:
    """The seeded model, its optimizer, and all else that training needs of the config.

    What the sample grids need is loaded here too, on `device`: a guide or an autoencoder that is
    missing must show now, and not at the first grid, after days of training.

    Args:
        starts: whether the model gets the weights of `train.init_from`, if there are any.
        sharded: whether the processes share out the weights.

    Raises:
        ConfigError, ValueError: settings that do not fit together; nothing has been written yet.
    """
    if not dataset.num_classes:
        config.flow.unused("flow.class_dropout_prob", "with data that have no classes")
        config.evaluate.unused("evaluate.labels", "with data that have no classes")
    objective, sampling = build_objective(config), build_sampling(config)
    averages = averages_of(config)
    torch.manual_seed(config.seed)
    model = build_model(config, dataset.image_shape, dataset.num_classes)
    initial = {}
    if starts and config.train.init_from:
        origin = load_initial(model, config.train.init_from, config.model.pc)
        initial = {"init_from": origin}
    if sharded:
        share_out(model, torch.device(device))
    optimizer = build_optimizer(model, **optimizer_arguments(config))
    _check_averages(config, averages_itself(optimizer))
    decode = load_decoder(dataset.autoencoder, device)
    guide = load_guide(config, dataset, device)
    return Components(
        model=model,
        optimizer=optimizer,
        objective=objective,
        averages=averages,
        sampling=sampling,
        guide_model=guide.model,
        decode=decode,
        initial=initial,
        sharded=sharded,
    )


def _check_averages(config: Config, by_optimizer: bool) -> None:
    """Check that either the run averages the weights or its optimizer does."""
    lists, class_path = ("ema_decays", "ema_lengths"), getattr(config.optimizer, "class_path", "")
    given = [f"train.{key}" for key in lists if getattr(config.train, key)]
    if by_optimizer and given:
        raise ConfigError(
            f"{given[0]}: {class_path} averages the weights itself, and an average of those that "
            f"it trains is not meant to be used; set {' and '.join(f'{key}=[]' for key in given)}"
        )
    if not by_optimizer and not given:
        raise ConfigError(
            f"train.ema_decays and train.ema_lengths are both empty, and {class_path} does not "
            "average the weights itself: give one"
        )


def optimizer_arguments(config: Config) -> dict[str, Any]:
    """Section `optimizer` as keyword arguments of `build_optimizer`."""
    settings = with_damping_in_steps(config).optimizer.model_dump()
    if settings.get("ns_dtype") is not None:
        settings["ns_dtype"] = getattr(torch, settings["ns_dtype"])
    return settings


def make_accelerator(config: Config) -> Accelerator:
    """The devices and processes of this launch.

    The config decides alone; what accelerate's environment says of precision, accumulation and
    compilation does not count.

    Raises:
        ConfigError, ValueError: a precision that the device lacks, a batch size that does not
            divide, or a kind of parallelism that the trainer does not support.
    """
    settings = config.train
    check_trackers(config)
    check_launch()
    keep_freed_memory()
    # cuDNN's backward pass of attention in bfloat16 can return NaN on H100 and H200, of large
    # negative logits (pytorch/pytorch#196678); flash attention takes its place.
    torch.backends.cuda.enable_cudnn_sdp(False)
    AcceleratorState._reset_state()  # an earlier run in this process may have set it
    try:
        # With cpu=True, accelerate connects several processes without a GPU through gloo.
        cpu = not torch.accelerator.is_available()
        with patch_environment(ACCELERATE_USE_FSDP="false"):  # which it can on GPUs alone
            accelerator = Accelerator(
                mixed_precision=settings.precision,
                cpu=cpu,
                log_with=list(settings.trackers) or None,
                project_config=ProjectConfiguration(
                    logging_dir=str(Path(config.output) / config.name / "tensorboard")
                ),
                kwargs_handlers=[
                    InitProcessGroupKwargs(timeout=timedelta(seconds=settings.process_timeout))
                ],
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                dynamo_plugin=TorchDynamoPlugin(backend="no"),  # pyright: ignore
            )
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
    if settings.precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("train.precision=fp16: CPUs train in float32 then; use bf16 or no")
    if settings.precision == "fp16" and asks_for_shards() and accelerator.num_processes > 1:
        raise ConfigError("train.precision=fp16: not with FSDP2; use bf16 or no")
    share = accelerator.num_processes * settings.accumulation_steps
    if settings.global_batch_size % share:
        raise ConfigError(
            f"train.global_batch_size {settings.global_batch_size} is not a multiple of "
            f"{accelerator.num_processes} processes x {settings.accumulation_steps} "
            "train.accumulation_steps"
        )
    return accelerator
