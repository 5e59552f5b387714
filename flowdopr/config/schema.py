"""Every setting of flowdopr: its type, default, range, unit and meaning.

There is one class for each section of the YAML file. Where the settings of a section depend on its
`name`, there is one class for each name or group of names. `load.py` reads the files.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flowdopr.config.flow import FlowConfig
from flowdopr.config.model import DiTConfig, OwnConfig, UNetConfig
from flowdopr.config.optimizer import AdamWConfig, OptimizerConfig
from flowdopr.config.sample import SampleConfig
from flowdopr.config.types import (
    NAMED,
    Count,
    CountOrZero,
    Fraction,
    Function,
    PathText,
    Positive,
    Section,
    Weights,
    Word,
    Words,
)

FILES = ("folder", "zip", "tar")
DOWNLOADED = ("mnist", "fashion_mnist", "cifar10", "cifar100")
USED_BY = {  # the data sets that use a setting, where not all do
    "root": (*DOWNLOADED, *FILES, "latents"),
    **dict.fromkeys(("image_size", "channels"), ("digits", *DOWNLOADED, *FILES, "own")),
    "resize": FILES,
    "held_out_fraction": ("digits", *FILES),
    "held_out_root": (*FILES, "latents"),
    "on_bad_image": FILES,
    "download": (*DOWNLOADED, "latents"),
    "num_workers": (*FILES, "latents"),
    "cache": FILES,
    **dict.fromkeys(("autoencoder", "source_root"), ("latents",)),
    **dict.fromkeys(("factory", "options"), ("own",)),
}


class DataConfig(Section):
    # fmt: off
    name: Literal[
        "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "folder", "zip", "tar",
        "latents", "own",
    ]
    # fmt: on
    """Data set. `digits` ships with scikit-learn; `folder`, `zip` and `tar` hold your own images,
    flat or one folder a class, `tar` also webdataset's shards; `latents` is what `flowdopr encode`
    wrote; `own` is what a function of yours returns: docs/data.md."""
    root: PathText = "data"
    """Where the data set is or is downloaded to: a folder, or the archive itself for `zip`; for
    `tar` the archive, a folder of archives or a pattern such as `'shards/{000..012}.tar'`."""
    image_size: Annotated[int, Field(ge=4, le=4096)] | None = None
    """Side in pixels: images are resized (shorter side) and centre-cropped. Default: as is."""
    resize: Literal["bilinear", "adm"] = "bilinear"
    """How `image_size` is reached. bilinear: antialiased. adm: as ADM, DiT and SiT prepare
    ImageNet, halving and then bicubic; for `folder`, `zip` and `tar`."""
    channels: Literal[1, 3] | None = None
    """1 (grey) or 3 (RGB). Default: as the data set has them; 3 for `folder`, `zip` and `tar`."""
    horizontal_flip: bool = False
    """Mirror each training image with probability 1/2. The FID reference is never mirrored."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share held out of training where the data set has no test split: digits, folder, zip, tar."""
    held_out_root: PathText | None = None
    """`folder`, `zip`, `tar`: place of the held-out images, instead of a share of `root`.
    `latents`: path of the held-out images that were encoded. null: their path at encoding."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What happens if an image cannot be decoded. error: training tries as many images as it can
    within some seconds before its first step, and ends if one is broken. skip: all images are
    decoded once, a cache remembers the broken ones, and the data set is that without them; for a
    large one, run `flowdopr check` first."""
    download: bool = True
    """Download a torchvision data set that is not in `root` yet."""
    num_workers: CountOrZero = 0
    """Processes that decode images, for each training process. 0: the training process itself."""
    cache: Literal["none", "memory"] = "none"
    """memory: each training process decodes all training images at its start and holds them as
    uint8; refused if they do not fit."""
    autoencoder: PathText | None = None
    """`latents`: path of the autoencoder. null: its path at encoding."""
    source_root: PathText | None = None
    """`latents`: path of the images that were encoded. null: their path at encoding."""
    factory: Function | None = None
    """`own`: the function that returns the images, as `module:function`; the environment variable
    FLOWDOPR_CODE must list it, because it runs code."""
    options: dict[str, Any] | None = None
    """`own`: the arguments of `factory`."""

    @property
    def place(self) -> str:
        """The setting that says where the images come from, for messages."""
        return f"data.factory={self.factory}" if self.factory else f"data.root={self.root}"

    @model_validator(mode="after")
    def _every_setting_is_used(self) -> DataConfig:
        for key, names in USED_BY.items():
            if self.name not in names:
                why = f"by data.name={self.name}, only by {', '.join(names)}"
                self.unused(f"data.{key}", why)
        if self.held_out_root is not None:
            self.unused("data.held_out_fraction", "beside data.held_out_root")
        if self.name == "own" and self.factory is None:
            raise ValueError("data.name=own needs data.factory: MODULE:FUNCTION")
        if self.resize == "adm" and self.image_size is None:
            raise ValueError(
                "data.resize=adm needs data.image_size: set it, or data.resize=bilinear"
            )
        return self


class TrainConfig(Section):
    steps: Count
    """Optimizer steps in all."""
    global_batch_size: Count
    """Images per optimizer step, over all processes and accumulation steps."""
    accumulation_steps: Count = 1
    """Forward-backward passes per optimizer step; each sees an equal share of the batch."""
    max_grad_norm: Positive | None = 1.0
    """Clip the gradient (before AP) to this norm; null: never."""
    max_skipped_steps: Count = 10
    """A step whose loss or gradient is not finite is skipped and counted. After this many in a row
    training ends, and names the layer."""
    process_timeout: Positive = 1800.0
    """Seconds that a process waits for the others before the run ends because one of them hangs.
    The first one alone computes held-out losses and sample grids, while the others wait."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision; `no` is float32."""
    compile: bool = False
    """Run the model through torch.compile."""
    warmup_steps: CountOrZero = 0
    """Steps over which the learning rate rises linearly to `optimizer.lr`."""
    lr_decay: Literal["constant", "linear", "cosine", "cooldown"] = "constant"
    """Course of the learning rate after warm-up; linear and cosine end at 0. cooldown: constant,
    then linear to 0 over the last `cooldown_steps`, so that runs of several lengths share their
    steps before it."""
    cooldown_steps: Count | None = None
    """Steps of the cooldown; null: without one."""
    init_from: PathText | None = None
    """Start from these weights: those of a run folder (of its newest checkpoint, the average that
    samples are drawn with), or a file of weights of flowdopr, SiT, DiT, torchcfm, flow_matching or
    ADM (docs/exchange.md). null: a new model."""
    ema_decays: tuple[Fraction, ...] = (0.9999,)
    """Decays of exponential weight averages; samples are drawn with the first one. At step k a
    decay is at most (1 + k) / (10 + k). `[]` for an optimizer that averages the weights itself."""
    ema_lengths: tuple[Annotated[float, Field(gt=0, le=0.28)], ...] = ()
    """Relative lengths (sigma_rel) of power-function averages (EDM2). From two or more, such as
    [0.05, 0.1], and several checkpoints, other lengths are reconstructed afterwards as
    weights `posthoc-LENGTH`. A length that they reconstruct badly is refused."""
    log_every: Count = 50
    """Steps between lines of metrics.jsonl."""
    validate_every: Count | None = None
    """Steps between held-out one-step losses; null: only at the end."""
    sample_every: Count | None = None
    """Steps between sample grids; null: only at the end."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; null: only at the end (and when interrupted)."""
    keep_checkpoints: Count | None = None
    """How many of the newest checkpoints stay on disk; null: all. The averages of `ema_lengths` of
    deleted checkpoints stay, for `posthoc-LENGTH`."""
    keep_every: Count | None = None
    """Checkpoints whose step is a multiple of this stay too; null: none."""
    keep_best: bool = False
    """The checkpoint of the lowest held-out loss stays too."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that also show the lines of metrics.jsonl, the sample grids and the config;
    `pip install "flowdopr[trackers]"` installs all three."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.global_batch_size % self.accumulation_steps:
            raise ValueError(
                f"train.global_batch_size {self.global_batch_size} is not a multiple of "
                f"train.accumulation_steps {self.accumulation_steps}"
            )
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"train.warmup_steps {self.warmup_steps} is more than train.steps {self.steps}: "
                "set train.warmup_steps too"
            )
        if (self.lr_decay == "cooldown") != (self.cooldown_steps is not None):
            raise ValueError(
                "train.cooldown_steps: it belongs to train.lr_decay=cooldown, set both or neither"
            )
        if self.warmup_steps + (self.cooldown_steps or 0) > self.steps:
            raise ValueError(
                f"train.cooldown_steps {self.cooldown_steps} and train.warmup_steps "
                f"{self.warmup_steps} together are more than train.steps {self.steps}"
            )
        if self.warmup_steps == self.steps:
            self.unused("train.lr_decay", "where every step is one of train.warmup_steps")
        if self.keep_checkpoints is None:
            for key in ("keep_every", "keep_best"):
                self.unused(f"train.{key}", "where train.keep_checkpoints=null keeps all")
        if self.validate_every is None:
            self.unused("train.keep_best", "without train.validate_every")
        return self


class ClassifierConfig(Section):
    name: Literal["classifier"]
    """Feature space: a classifier trained on the data set; gives FD."""


class InceptionConfig(Section):
    name: Literal["inception"]
    """Feature space: torch-fidelity's Inception network; gives FID."""
    weights: PathText | None = None
    """Path of its weights, a file of tensors that can run no code. null: downloaded at first
    use."""


class ImageNetConfig(Section):
    name: Literal["imagenet"]
    """Feature space: EfficientNet-Lite0 trained on ImageNet, whose weights come with
    `flowdopr[imagenet]`; gives FD."""


class DINOv2Config(Section):
    name: Literal["dinov2"]
    """Feature space: DINOv2's ViT-B/14, with `flowdopr[imagenet]`; gives FD."""
    weights: PathText
    """Path of its weights, dinov2_vitb14_pretrain.pth."""


class BitsPerDimConfig(Section):
    num_images: Count = 64
    """Number of held-out images. The ODE is solved by dopri5 without guidance."""
    trace: Literal["hutchinson", "exact"] = "hutchinson"
    """Divergence: estimated with one backward pass per model call, or exact with one per pixel."""
    atol: Positive = 1e-5
    """Absolute tolerance of dopri5."""
    rtol: Positive = 1e-5
    """Relative tolerance of dopri5."""


class ExcessConfig(Section):
    num_images: Count = 256
    """Number of training images on the path and of rollouts. Each model call is compared with the
    whole training set."""
    space: Literal["velocity", "data"] = "velocity"
    """Space of `rollout_excess`: the velocity, where times near 1 dominate, or the data,
    E[x_1 | x_t]."""


class DriftConfig(Section):
    num_images: Annotated[int, Field(ge=2)] = 512
    """Number of held-out images, and of rollouts."""


class EvaluateConfig(Section):
    extractor: Annotated[
        ClassifierConfig | InceptionConfig | ImageNetConfig | DINOv2Config, NAMED
    ] = ClassifierConfig(name="classifier")
    metrics: tuple[Literal["fd", "fd_by_images", "kid", "isc", "prc", "spectrum"], ...] = (
        "fd",
        "kid",
        "prc",
        "spectrum",
    )
    """Metrics of rollouts: Frechet distance, the same by number of images and extrapolated to
    infinitely many, kernel distance, inception score, precision and recall, and the variance along
    the principal directions of the data, which needs no feature space."""
    reference: PathText | None = None
    """npz file with mean `mu` and covariance `sigma` of real images' features, as pytorch-fid,
    clean-fid and ADM use them; it must be of `extractor`'s own features (docs/exchange.md). null:
    the training images."""
    bpd: BitsPerDimConfig | None = None
    """Bits per dimension of held-out images: its settings, `{}` for the defaults. null: not
    measured."""
    excess: ExcessConfig | None = None
    """The model's excess error over the training set's exact velocity: its settings, `{}` for the
    defaults. null: not measured."""
    drift: DriftConfig | None = None
    """Distance of the rollouts' states from the path's points over time: its settings, `{}` for the
    defaults. null: not measured."""
    fid_num_images: Annotated[int, Field(ge=2)] = 10_000
    """Number of generated images. With fewer than 50,000, FID cannot stand beside published ones,
    and the card says `proxy: true`."""
    gallery: CountOrZero = 16
    """How many of the generated images are kept beside the card, each with the training image
    nearest to it."""
    labels: Literal["balanced", "data"] = "balanced"
    """Labels of the generated images: equally many of each class, or as frequent as in the data."""
    weights: Weights = "ema"
    """Which weights: `ema` (the average that samples are drawn with), `raw` (those that are
    trained), an average's own name such as `ema-0.999` or `power-0.1`, `posthoc-LENGTH`, or `own`,
    the average that the optimizer keeps itself."""
    seed: CountOrZero = 0
    """Seed of the rollouts' noise and of the one-step loss's noise and times."""

    @model_validator(mode="after")
    def _metrics_have_what_they_need(self) -> EvaluateConfig:
        without = [name for name in ("kid", "prc") if name in self.metrics]
        if self.reference is not None and without:
            raise ValueError(
                f"evaluate.metrics: {' and '.join(without)} compare single images, of which "
                "evaluate.reference has only mean and covariance: write evaluate.metrics=[fd]"
            )
        if not {"fd", "fd_by_images"} & set(self.metrics):
            self.unused("evaluate.reference", "without fd in evaluate.metrics")
        if "isc" in self.metrics and self.extractor.name == "dinov2":
            raise ValueError(
                "evaluate.metrics: isc needs a network that classifies, and dinov2 does not; "
                "remove it, or choose evaluate.extractor=imagenet"
            )
        return self


class ArmConfig(Section):
    name: Word
    """Name in the table and in the run folders."""
    lrs: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Learning rates tried. Every arm must have equally many trials."""
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Further settings tried, each a list, such as `optimizer.dopr.damping: [0.1, 1]`. Every
    combination with a learning rate is a trial."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted overrides of this arm, such as `optimizer.name: dopr-adamw`."""

    @property
    def trials(self) -> int:
        """The number of trials: combinations of learning rate and `grid`."""
        return len(self.lrs) * math.prod(len(values) for values in self.grid.values())


class CompareConfig(Section):
    arms: Annotated[tuple[ArmConfig, ...], Field(min_length=1)]
    """What is compared: one entry for each arm, such as an optimizer. Each learning rate and seed
    of an arm is one run."""
    seeds: Annotated[tuple[CountOrZero, ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of the runs that are reported."""
    tuning_seeds: tuple[CountOrZero, ...] = ()
    """Seeds of the runs that choose each arm's trial, which alone is then run with `seeds`.
    Needed as soon as arms have several trials."""
    widen: Annotated[int, Field(ge=0, le=5)] = 0
    """Rounds in which every arm tries one more learning rate, while the best one of any arm lies at
    the edge of those tried: beyond that edge or, for an arm whose best lies inside, between it and
    the better of its neighbours. So all arms keep the same number of trials."""
    train_steps: tuple[Count, ...] = ()
    """Smaller values of `train.steps`: each reported run is repeated with them, its learning rate
    decaying as it does there, and arms are compared at equal loss and time by the ends of these
    runs. With `train.lr_decay: cooldown` they cost their cooldowns alone, which begin at
    checkpoints of the longest run."""
    weights: tuple[Weights, ...] = ()
    """Weight averages with which every checkpoint is evaluated beside `evaluate.weights`, such as
    `[raw, ema-0.999]`; the comparison at equal loss is a mean over all of them."""
    evaluation_seeds: tuple[CountOrZero, ...] = ()
    """Further values of `evaluate.seed` with which the last checkpoint is evaluated, so that the
    noise of the evaluation is known apart from that of training."""
    nfe_steps: tuple[Count, ...] = ()
    """Solver steps at which the last checkpoint is evaluated again, for the FD-against-NFE plot."""
    nfe_solvers: tuple[Word, ...] = ()
    """Solvers of fixed steps for that plot, beside the run's own, such as `[euler, heun2]`."""
    workers: Count = 1
    """Runs at a time, each with an equal share of the CPU cores; with `--cluster`, jobs at a time,
    those that wait included."""
    cluster: dict[str, Any] = Field(default_factory=dict)
    """With `--cluster`, submitit's parameters of each job, such as `{timeout_min: 120,
    slurm_partition: gpu, gpus_per_node: 1, cpus_per_task: 8, mem_gb: 32}`."""

    @model_validator(mode="after")
    def _consistent(self) -> CompareConfig:
        names = [arm.name for arm in self.arms]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"compare.arms: the name '{twice[0]}' is given twice")
        for key in ("train_steps", "evaluation_seeds", "nfe_steps", "nfe_solvers"):
            values = getattr(self, key)
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"compare.{key}: {twice[0]} is given twice; remove one")
        trials = {arm.name: arm.trials for arm in self.arms}
        if len(set(trials.values())) > 1:
            each = ", ".join(f"'{name}' {number}" for name, number in trials.items())
            raise ValueError(
                f"compare.arms: the numbers of trials differ ({each}), so one optimizer would be "
                "tuned more than another; give each arm as many `lrs` x `grid` values"
            )
        if self.widen and any(len(arm.lrs) < 2 for arm in self.arms):
            raise ValueError(
                "compare.widen: needs two learning rates or more in the lrs of every arm; "
                "add some, or set compare.widen=0"
            )
        seeds = [*self.tuning_seeds, *self.seeds]
        if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
            raise ValueError(
                f"compare.seeds, compare.tuning_seeds: the seed {twice[0]} is given twice; the "
                "seeds that choose the trial must not be those that are reported"
            )
        if not self.tuning_seeds and self.arms[0].trials > 1:
            raise ValueError(
                f"compare.tuning_seeds: arms have {self.arms[0].trials} trials, and the seeds that "
                "are reported must not choose among them; name others, such as "
                "compare.tuning_seeds=[100]"
            )
        if self.tuning_seeds and self.arms[0].trials == 1:
            raise ValueError(
                "compare.tuning_seeds: every arm has one trial, so there is nothing to choose; "
                "set compare.tuning_seeds=[]"
            )
        return self


class Config(Section):
    name: Words
    """Name of the experiment; the run folder is `<output>/<name>`."""
    output: PathText = "runs"
    """Folder that holds the run folders."""
    seed: CountOrZero = 0
    """Seed of weights, batches, noise, times and label dropout."""
    data: DataConfig
    model: Annotated[DiTConfig | UNetConfig | OwnConfig, NAMED]
    flow: FlowConfig = FlowConfig()
    optimizer: OptimizerConfig = AdamWConfig(name="adamw")
    train: TrainConfig
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig | None = None

    @model_validator(mode="after")
    def _every_setting_is_used(self) -> Config:
        if not self.model.class_conditional:
            why = "with model.class_conditional=false"
            self.flow.unused("flow.class_dropout_prob", why)
            self.evaluate.unused("evaluate.labels", why)
        if self.train.global_batch_size == self.train.accumulation_steps:
            self.flow.unused("flow.coupling", "where a micro-batch is one image")
        if self.train.global_batch_size == 1:
            self.flow.time.unused("flow.time.stratified", "with train.global_batch_size=1")
        if hasattr(self.optimizer, "nesterov") and getattr(self.optimizer, "momentum", 1) == 0:
            self.optimizer.unused("optimizer.nesterov", "with optimizer.momentum=0")
        averaged = self.train.ema_decays or self.train.ema_lengths
        if not averaged and self.optimizer.name != "outside":
            raise ValueError("train.ema_decays and train.ema_lengths are both empty: give one")
        dopr = getattr(self.optimizer, "dopr", None)
        if dopr is not None and self.model.name == "dit":
            dopr.unused("optimizer.dopr.conv_mode", "by model.name=dit, which has no convolutions")
        if dopr is not None and self.model.pc is None:
            dopr.unused("optimizer.dopr.pc_gradient", "without model.pc")
        for rule in dopr.rules if dopr is not None else ():
            for key in ("max_side", "max_rows") if rule.mode == "none" else ():
                rule.unused(f"optimizer.dopr.rules[].{key}", "with mode=none")
        return self
