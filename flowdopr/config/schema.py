"""Every setting of flowdopr: its type, default, range, unit and meaning.

One class a section of the YAML file. Nothing here reads files (`load.py` does) and nothing here
imports another room. A setting that a section does not use is refused, not ignored; `idle.py`
lists those whose use depends on others.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flowdopr.config.model import DiTConfig, UNetConfig
from flowdopr.config.optimizer import OptimizerConfig
from flowdopr.config.types import Count, CountOrZero, Fraction, NotNegative, Positive, Section

WeightsName = Annotated[str, Field(pattern=r"^(ema|raw|ema-.+|power-.+|posthoc-.+)$")]


PLAIN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # no part of a path leads out of its folder


class DataConfig(Section):
    # fmt: off
    name: Literal[
        "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "folder", "zip", "latents"
    ]
    # fmt: on
    """Data set. `digits` ships with scikit-learn; `folder` and `zip` hold images of your own, flat
    or one folder a class; `latents` is what `flowdopr encode` wrote."""
    root: str = "data"
    """Where the data set lies or is downloaded to: a folder, or the archive itself for `zip`."""
    image_size: Annotated[int, Field(ge=4, le=4096)] | None = None
    """Side in pixels: images are resized (shorter side) and centre-cropped. Default: as is."""
    resize: Literal["bilinear", "adm"] = "bilinear"
    """How `image_size` is reached. bilinear: antialiased. adm: as ADM, DiT and SiT prepare
    ImageNet, halving and then bicubic; for `folder` and `zip`."""
    channels: Literal[1, 3] | None = None
    """1 (grey) or 3 (RGB). Default: as the data set has them; 3 for `folder` and `zip`."""
    horizontal_flip: bool = False
    """Mirror each training image with probability 1/2. The FID reference is never mirrored."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share held out of training where the data set has no test split (digits, folder, zip)."""
    held_out_root: str | None = None
    """`folder`, `zip`: images to hold out that lie apart, in place of a share of `root`. `latents`:
    where those lie now."""
    download: bool = True
    """Download a torchvision data set that is not in `root` yet."""
    num_workers: CountOrZero = 0
    """Processes that decode images, for each training process. 0: the training process itself."""
    autoencoder: str | None = None
    """`latents`: where the autoencoder lies now. null: where it lay at encoding."""
    source_root: str | None = None
    """`latents`: the `root` of the encoded images now. null: as at encoding."""

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        latents = self.name == "latents"
        for key in ("image_size", "channels") if latents else ("autoencoder", "source_root"):
            if getattr(self, key) is not None:
                remedy = "set it at encoding" if latents else "it belongs to data.name=latents"
                raise ValueError(f"data.{key} is not used by data.name={self.name}: {remedy}")
        files = self.name in ("folder", "zip")
        if self.resize == "adm" and (self.image_size is None or not files):
            raise ValueError(
                "data.resize=adm is for data.name=folder or zip with data.image_size: set these, "
                "or data.resize=bilinear"
            )
        if self.held_out_root is not None and self.name not in ("folder", "zip", "latents"):
            raise ValueError(
                f"data.held_out_root is not used by data.name={self.name}: it belongs to folder "
                "and zip"
            )
        return self


class FlowConfig(Section):
    path: Literal["linear", "trigonometric", "variance_preserving", "cosine", "polynomial"] = (
        "linear"
    )
    """Path from noise x_0 to data x_1."""
    path_options: dict[str, float] = Field(default_factory=dict)
    """Numbers of that path: `beta_min`, `beta_max` (variance_preserving), `offset` (cosine),
    `power` (polynomial)."""
    prediction: Literal["velocity", "data", "noise"] = "velocity"
    """What the model gives; rollouts convert it to the velocity exactly."""
    weighting: Literal["uniform", "velocity", "likelihood", "edm"] = "uniform"
    """Weight of the squared error over time: `uniform` in the predicted quantity, `velocity` and
    `likelihood` as in SiT, `edm` as in EDM."""
    sigma_data: Positive = 0.5
    """Standard deviation of the data, for the weighting `edm`."""
    time_distribution: Literal["uniform", "logit_normal", "edm"] = "uniform"
    """Training times: uniform, logit-normal (Stable Diffusion 3), or EDM's noise levels."""
    time_mean: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Mean of the logit-normal; positive leans towards the data."""
    time_std: Positive = 1.0
    """Standard deviation of the logit-normal."""
    time_shift: Positive = 1.0
    """Resolution shift towards the noise; 1 is none."""
    time_stratified: bool = True
    """One time in each of B equally likely bins of the global batch, rather than independent."""
    coupling: Literal["independent", "exact", "entropic"] = "independent"
    """Which noise goes with which image of a micro-batch: as drawn, or by optimal transport (exact
    by scipy, entropic by Sinkhorn), within classes where the model has them."""
    coupling_regularisation: Positive = 0.05
    """Entropy of `entropic`, in units of the mean squared distance."""
    coupling_iterations: Count = 100
    """Sinkhorn's passes over rows and columns in `entropic`."""
    class_dropout_prob: Fraction = 0.1
    """Chance, for each sample on its own, that a training label is replaced by the null label."""


class TrainConfig(Section):
    steps: Count
    """Optimizer steps in all."""
    global_batch_size: Count
    """Images an optimizer step, over all processes and accumulation steps."""
    accumulation_steps: Count = 1
    """Forward-backward passes an optimizer step; each sees an equal share of the batch."""
    max_grad_norm: Positive | None = 1.0
    """Clip the gradient (before AP) to this norm; null: never."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision; `no` is float32."""
    compile: bool = False
    """Run the model through torch.compile."""
    warmup_steps: CountOrZero = 0
    """Steps over which the learning rate rises linearly to `optimizer.lr`."""
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up; linear and cosine end at 0."""
    ema_decays: tuple[Fraction, ...] = (0.9999,)
    """Decays of exponential weight averages; the first one is sampled from. Step k uses at most
    (1 + k) / (10 + k)."""
    ema_lengths: tuple[Annotated[float, Field(gt=0, le=0.28)], ...] = ()
    """Relative lengths (sigma_rel) of power-function averages (EDM2). From two or more, such as
    [0.05, 0.1], and several checkpoints, other lengths are made afterwards: weights
    `posthoc-LENGTH`. A length that they give only roughly is refused."""
    log_every: Count = 50
    """Steps between lines of metrics.jsonl."""
    validate_every: Count | None = None
    """Steps between held-out one-step losses; null: only at the end."""
    sample_every: Count | None = None
    """Steps between sample grids; null: only at the end."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; null: only at the end (and when interrupted)."""
    keep_checkpoints: Count | None = None
    """How many of the newest checkpoints stay on disk; null: all. Of those dropped, the averages of
    `ema_lengths` stay, for `posthoc-LENGTH`."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.global_batch_size % self.accumulation_steps:
            raise ValueError(
                f"train.global_batch_size {self.global_batch_size} is not a multiple of "
                f"train.accumulation_steps {self.accumulation_steps}"
            )
        if not (self.ema_decays or self.ema_lengths):
            raise ValueError("train.ema_decays and train.ema_lengths are both empty: give one")
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"train.warmup_steps {self.warmup_steps} is more than train.steps {self.steps}: "
                "set train.warmup_steps too"
            )
        return self


class SampleConfig(Section):
    solver: str = "midpoint"
    """torchdiffeq method: euler, midpoint, heun2, rk4, ... (fixed) or dopri5, ... (adaptive); or
    an SDE solver: euler_maruyama, sde_heun."""
    steps: Count = 50
    """Steps of a fixed-step solver."""
    time_grid: Literal["uniform", "edm", "shifted"] | tuple[float, ...] = "uniform"
    """Times of a one-step solver: equal steps, EDM's rho grid, shifted, or a list from 0 to 1."""
    grid_shift: Positive = 3.0
    """Shift of the grid `shifted`."""
    grid_rho: Positive = 7.0
    """rho of the grid `edm`."""
    atol: Positive = 1e-5
    """Absolute tolerance of an adaptive solver."""
    rtol: Positive = 1e-5
    """Relative tolerance of an adaptive solver."""
    noise_scale: NotNegative = 1.0
    """SDE solvers: w_t = 2 noise_scale sigma_t; 1 is SiT's default, 0 is the ODE."""
    last_step: Literal["tweedie", "mean"] = "tweedie"
    """SDE solvers: the step to the image, without fresh noise. `tweedie`: the posterior mean.
    `mean`: the drift's, SiT's default."""
    last_step_size: Annotated[float, Field(gt=0, lt=1)] | None = None
    """SDE solvers: its length in time (SiT: 0.04). null: the last interval of the time grid."""
    guidance_scale: NotNegative = 1.0
    """Classifier-free guidance; 1 is off."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times between which there is guidance."""
    guide_run: str | None = None
    """Autoguidance: the folder of a run, worse than this one, whose model takes the place of the
    unconditional branch."""
    guide_weights: WeightsName = "ema"
    """Which weights of `guide_run`, as `evaluate.weights`."""
    guide_step: Count | None = None
    """Checkpoint of `guide_run`; null: its newest."""
    batch_size: Count = 256
    """Images rolled out together. With fixed steps it does not change what image i looks like;
    adaptive solvers and implicit Adams choose steps for a batch: there, only up to `atol`, `rtol`.
    """
    num_images: Count = 64
    """Images in a training run's sample grids."""

    @model_validator(mode="after")
    def _consistent(self) -> SampleConfig:
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"sample.guidance_interval is [{low:g}, {high:g}]: need 0 <= low < high <= 1"
            )
        if self.guide_run is not None and self.guidance_scale == 1:
            raise ValueError(
                "sample.guide_run has no effect at sample.guidance_scale 1: set another scale"
            )
        if self.guide_run is None and (self.guide_step, self.guide_weights) != (None, "ema"):
            raise ValueError(
                "sample.guide_step and sample.guide_weights choose from sample.guide_run: set it"
            )
        return self


class EvaluateConfig(Section):
    extractor: Literal["classifier", "inception"] = "classifier"
    """Feature space: `classifier` (trained on the data set; gives FD) or `inception` (FID)."""
    inception_weights: str | None = None
    """Path of torch-fidelity's Inception weights; null: downloaded at first use."""
    metrics: tuple[Literal["fd", "kid", "isc", "prc", "bpd", "excess"], ...] = ("fd", "kid", "prc")
    """Of the rollouts: Frechet distance, kernel distance, inception score, precision and recall.
    Of the model: bits per dimension, and its excess error over the training set's exact velocity.
    """
    fid_num_images: Annotated[int, Field(ge=2)] = 10_000
    """Generated images; fewer than 50,000 is a labelled proxy."""
    labels: Literal["balanced", "data"] = "balanced"
    """Labels of the generated images: equally many of each class, or as frequent as in the data."""
    weights: WeightsName = "ema"
    """Which weights: `ema` (the average that is sampled from), `raw`, an average's own name such as
    `ema-0.999` or `power-0.1`, or `posthoc-LENGTH`."""
    seed: CountOrZero = 0
    """Seed of the rollouts' noise and of the one-step loss's noise and times."""
    bpd_num_images: Count = 64
    """Held-out images of `bpd`, by dopri5 at `sample.atol` and `sample.rtol`, without guidance."""
    bpd_trace: Literal["hutchinson", "exact"] = "hutchinson"
    """Divergence in `bpd`: estimated by one backward pass a call, or exact by one a pixel."""
    excess_num_images: Count = 256
    """Training images of `excess` on the path, and as many rollouts. Each model call is compared
    with the whole training set."""
    excess_space: Literal["velocity", "data"] = "velocity"
    """Of `rollout_excess`: that of the velocity, ruled by the last times, or of E[x_1 | x_t]."""


class ArmConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name in the table and in the run folders."""
    lrs: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Learning rates tried. Give every arm as many: equal tuning budgets."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted overrides of this arm, such as `optimizer.name: dopr-adamw`."""


class CompareConfig(Section):
    arms: Annotated[tuple[ArmConfig, ...], Field(min_length=1)]
    """What is compared; each arm x learning rate x seed is one run."""
    seeds: Annotated[tuple[CountOrZero, ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of the runs."""
    nfe_steps: tuple[Count, ...] = ()
    """Solver steps at which the last checkpoint is evaluated again, for the FD-against-NFE plot."""
    workers: Count = 1
    """Runs at a time, each with an equal share of the CPU cores."""

    @model_validator(mode="after")
    def _consistent(self) -> CompareConfig:
        names = [arm.name for arm in self.arms]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"compare.arms: the name '{twice[0]}' is given twice")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"compare.seeds: a seed is given twice in {list(self.seeds)}")
        return self


class Config(Section):
    name: Annotated[str, Field(pattern=rf"^{PLAIN_NAME}(/{PLAIN_NAME})*$")]
    """Name of the experiment; the run folder is `<output>/<name>`."""
    output: str = "runs"
    """Folder that holds the run folders."""
    seed: CountOrZero = 0
    """Seed of weights, batches, noise, times and label dropout."""
    data: DataConfig
    model: Annotated[DiTConfig | UNetConfig, Field(discriminator="name")]
    flow: FlowConfig = FlowConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig | None = None
