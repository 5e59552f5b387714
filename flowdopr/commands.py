"""The commands `flowdopr train | sample | evaluate | compare | export | encode | check | status |
configs`.

Modules are imported inside the commands, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from flowdopr import __version__
from flowdopr.exits import KEPT, LESS_MEMORY, OutOfMemory, Stopped, importing, is_out_of_memory

if TYPE_CHECKING:
    from flowdopr.config import Config


class Commands(TyperGroup):
    """Commands that on Ctrl-C raise `Stopped` and with too little memory `OutOfMemory`, which one
    line explains."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            name = ctx.invoked_subcommand
            raise Stopped(f"{name} stopped; {KEPT[name]}") from None
        except Exception as error:
            name = ctx.invoked_subcommand
            if name not in LESS_MEMORY or not is_out_of_memory(error):
                raise
            raise OutOfMemory(f"{name}: out of memory; {LESS_MEMORY[name]}") from error


app = typer.Typer(
    cls=Commands, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
configs = typer.Typer(rich_markup_mode=None)
app.add_typer(configs, name="configs", invoke_without_command=True)


def _path(text: str) -> Path:
    """A path option, for shells that leave `--out=~/samples` as it is."""
    return Path(os.path.expanduser(text))


ConfigFile = Annotated[
    Path,
    Argument(metavar="CONFIG", parser=_path, help="YAML file, or a name that `configs` lists."),
]
RunPath = Annotated[
    Path, Argument(metavar="RUN", parser=_path, help="Run folder, such as runs/quickstart.")
]
DataPath = Annotated[
    Path,
    Argument(metavar="DATA", parser=_path, help="Config, or a folder, ZIP or tar of images."),
]
ImagesPath = Annotated[
    Path,
    Option(
        "--out",
        metavar="<Path>",
        parser=_path,
        help="Folder for the images; if sampling into it was interrupted, it goes on.",
    ),
]
LatentsPath = Annotated[
    Path,
    Option(
        "--out",
        metavar="<Path>",
        parser=_path,
        help="Folder for the latents; if encoding into it was interrupted, it goes on.",
    ),
]
ImageNumbers = Annotated[
    str | None, Option(help="In place of --num, the images to draw, by number: 3,7,10-19.")
]
Labels = Annotated[
    str | None, Option(help="Classes, repeated over the images: 3 or 0-9 or cat,dog.")
]
ImageSeed = Annotated[
    int,
    Option(
        min=0,
        help="Image i depends on the seed, i and its label alone (adaptive: up to tolerance).",
    ),
]
Npz = Annotated[
    bool,
    Option("--npz", help="Also write samples.npz as ADM's: arr_0 (uint8, NHWC), arr_1 (labels)."),
]
WithTrajectory = Annotated[
    bool, Option("--trajectory", help="Also write trajectory.png: x_t and predicted x_1 along t.")
]
AutoencoderPath = Annotated[
    str,
    Option(
        "--autoencoder",
        metavar="<str>",
        parser=os.path.expanduser,
        help="Folder in diffusers' format, or a name on the Hugging Face hub.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    Argument(
        metavar="[a.b=value ...]",
        help="Settings, listed in docs/settings.md; quote brackets and braces.",
    ),
]
PrintConfig = Annotated[
    bool, Option("--print-config", help="Print the resolved config as YAML, do nothing else.")
]
SavedReference = Annotated[
    Path | None,
    Option(
        "--save-reference",
        metavar="<Path>",
        parser=_path,
        help="Measure nothing: write mu and sigma of the training images' features to this npz.",
    ),
]
WhichWeights = Annotated[
    str, Option(help="Weights: ema, raw, an average's own name, or posthoc-LENGTH.")
]
ExportPath = Annotated[
    Path, Option("--out", metavar="<Path>", parser=_path, help="New folder for the model.")
]
Checkpoint = Annotated[int | None, Option(help="Checkpoint; default: the newest.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flowdopr {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Flow-matching image generation that judges optimizers by their samples."""


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, Option("--resume", help="Go on from the newest checkpoint, if there is one.")
    ] = False,
    changed_data: Annotated[
        bool, Option("--changed-data", help="With --resume: go on although the images changed.")
    ] = False,
    print_config: PrintConfig = False,
) -> None:
    """Train a model into the run folder <output>/<name>.

    Ctrl-C and SIGTERM save a checkpoint first; the same command with --resume goes on exactly where
    it stopped. Runs on several processes or GPUs under `accelerate launch -m flowdopr train ...`.
    """
    if changed_data and not resume:
        raise ValueError("--changed-data: it belongs to --resume, a new run takes any images")
    resolved = _resolved(config, overrides, print_config, one_run=True)
    with importing():
        from flowdopr.train import train as run_train

    _tell(run_train(resolved, resume=resume, changed_data=changed_data))


@app.command()
def sample(
    context: typer.Context,
    run: RunPath,
    out: ImagesPath,
    overrides: Overrides = None,
    num: Annotated[int | None, Option(min=1, help="Number of images; default: 64.")] = None,
    seeds: ImageNumbers = None,
    solver: Annotated[
        str | None, Option(help="torchdiffeq method or SDE solver, with its defaults.")
    ] = None,
    steps: Annotated[int | None, Option(help="Steps of a fixed-step solver.")] = None,
    atol: Annotated[float | None, Option(help="Absolute tolerance of the solver.")] = None,
    rtol: Annotated[float | None, Option(help="Relative tolerance of the solver.")] = None,
    guidance_scale: Annotated[
        float | None, Option(help="Scale of classifier-free guidance, or of that by --guide-run.")
    ] = None,
    guide_run: Annotated[
        str | None, Option(help="Autoguidance by the worse model of this run folder or file.")
    ] = None,
    guide_weights: Annotated[str | None, Option(help="Weights of the guide; default: ema.")] = None,
    guide_step: Annotated[
        int | None, Option(help="Checkpoint of the guide; default: the newest.")
    ] = None,
    labels: Labels = None,
    seed: ImageSeed = 0,
    step: Checkpoint = None,
    weights: WhichWeights = "ema",
    batch_size: Annotated[int | None, Option(help="Images at a time.")] = None,
    autoencoder: Annotated[
        str | None, Option(help="For a run on latents: place of the autoencoder, if it moved.")
    ] = None,
    npz: Npz = False,
    trajectory: WithTrajectory = False,
) -> None:
    """Draw images from a run: numbered PNGs and grid.png. Options default to the run's config.

    RUN may be a file that `flowdopr export` wrote.

    All settings of the section `sample` can be given as sample.key=value, which win over options.
    """
    with importing():
        from flowdopr.evaluate import sample as run_sample
        from flowdopr.evaluate import sample_overrides

    path = run_sample(
        run,
        [*sample_overrides(context.params), *(overrides or ())],
        num=num,
        numbers=seeds,
        out=out,
        labels=labels,
        seed=seed,
        step=step,
        weights=weights,
        npz=npz,
        trajectory=trajectory,
        autoencoder=autoencoder,
    )
    _tell(path)


@app.command()
def evaluate(
    run: RunPath,
    overrides: Overrides = None,
    step: Checkpoint = None,
    force: Annotated[
        bool, Option("--force", help="Measure again even where a card exists.")
    ] = False,
    save_reference: SavedReference = None,
) -> None:
    """Measure a run into a JSON card: one-step loss beside FD or FID, KID, precision, recall.

    Only settings of the sections `sample` and `evaluate` can be changed.
    """
    with importing():
        from flowdopr.config import ConfigError
        from flowdopr.evaluate import Evaluator
        from flowdopr.evaluate import evaluate as run_evaluate

    if save_reference is not None:
        if force or step is not None:
            raise ConfigError(
                "--save-reference measures no checkpoint: leave --step and --force out"
            )
        Evaluator(run).save_reference(save_reference, overrides or ())
        _tell(save_reference)
        return
    path = run_evaluate(run, overrides or (), step=step, force=force)
    card = json.loads(path.read_text(encoding="utf-8"))
    numbers = {k: v for k, v in card["metrics"].items() if isinstance(v, int | float)}
    _tell(*(f"{name:24} {value:.6g}" for name, value in numbers.items()), path)


@app.command()
def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, Option(min=1, help="Runs at a time; default: compare.workers.")
    ] = None,
    report_only: Annotated[
        bool, Option("--report-only", help="Only rebuild the report from finished runs.")
    ] = False,
    dry_run: Annotated[
        bool,
        Option(
            "--dry-run", help="Print which runs are left and how long they take, and run nothing."
        ),
    ] = False,
    cluster: Annotated[
        Literal["slurm", "local"] | None,
        Option(
            help="Run each run as a job of SLURM, as compare.cluster says; local: on this machine."
        ),
    ] = None,
    print_config: PrintConfig = False,
) -> None:
    """Train every arm of a study with its settings and seeds, evaluate each run, write report.html.

    Finished runs are skipped and interrupted ones go on, so the same command can be repeated.
    """
    resolved = _resolved(config, overrides, print_config)
    with importing():
        from flowdopr.compare import check_overrides
        from flowdopr.compare import compare as run_compare
        from flowdopr.compare.forecast import forecast

    check_overrides(overrides or ())
    if dry_run:
        print(forecast(resolved, workers=workers))
        return
    run_compare(resolved, workers=workers, report_only=report_only, cluster=cluster)


@app.command()
def status(
    path: Annotated[Path, Argument(metavar="RUN", parser=_path, help="Folder of a run or study.")],
    watch: Annotated[bool, Option("--watch", help="Show it anew every two seconds.")] = False,
) -> None:
    """Show on one screen how far a run or a study is, also while it runs.

    Step, time left, losses, newest FD, speed, memory, shares of time, and the warnings of its log.
    """
    with importing():
        from flowdopr.compare.status import status as read_status
        from flowdopr.terminal import watching

    if watch:
        watching(lambda: read_status(path))
    print(read_status(path))


@app.command()
def export(
    run: RunPath,
    out: ExportPath,
    step: Checkpoint = None,
    weights: WhichWeights = "ema",
    license: Annotated[
        str, Option(help="Licence of the weights for the model card, as the Hub names it.")
    ] = "unknown",
) -> None:
    """Write a model into a folder for others: a file with weights and config, and a model card.

    `flowdopr.load`, `flowdopr sample` and `train.init_from` read the file.
    """
    with importing():
        from flowdopr.export import export as run_export

    _tell(run_export(run, out, step=step, weights=weights, license=license))


@app.command()
def encode(
    config: ConfigFile,
    autoencoder: AutoencoderPath,
    out: LatentsPath,
    overrides: Overrides = None,
    kept: Annotated[
        Literal["posterior", "mean"],
        Option(help="posterior: each epoch draws its latents anew; mean: always the mean of it."),
    ] = "posterior",
    dtype: Annotated[Literal["float16", "float32"], Option(help="Of the latents.")] = "float16",
    shard_size: Annotated[int, Option(min=1, help="Images in a file.")] = 8192,
    batch_size: Annotated[int, Option(min=1, help="Images at a time.")] = 32,
) -> None:
    """Encode the images of CONFIG's section `data` once, for `data.name: latents`.

    Mirrored copies are encoded too where data.horizontal_flip is on. Needs flowdopr[latents].
    """
    with importing():
        from flowdopr.config import load_data_config
        from flowdopr.latents import encode as run_encode
    path = run_encode(
        load_data_config(config, overrides or ()),
        autoencoder=autoencoder,
        out=out,
        kept=kept,
        dtype=dtype,
        shard_size=shard_size,
        batch_size=batch_size,
    )
    _tell(path)


@app.command()
def check(data: DataPath, overrides: Overrides = None) -> None:
    """Decode every image of DATA as training does, and print a line for each broken one.

    Of latents, it compares the checksums. The exit code is 1 if anything is broken.
    """
    with importing():
        from flowdopr.latents import check as run_check

    broken = run_check(data, overrides or ())
    for line in broken:
        print(line)
    if broken:
        raise typer.Exit(1)


@configs.callback()
def list_configs(context: typer.Context) -> None:
    """List the configs that come with flowdopr; `show NAME` prints one.

    Each command takes such a name in place of a file, and so does `base:` in a config.
    """
    from flowdopr.config import shipped, title

    if context.invoked_subcommand is None:
        found = shipped()
        width = max(map(len, found), default=0)
        for name, file in found.items():
            print(f"{name:{width}}  {title(file)}")


@configs.command()
def show(
    name: Annotated[str, Argument(metavar="NAME", help="A name that `flowdopr configs` lists.")],
) -> None:
    """Print a config as a start for your own: flowdopr configs show quickstart > mine.yaml."""
    from flowdopr.config import ConfigError, did_you_mean, shipped

    if name not in shipped():
        raise ConfigError(f"configs show {name}: unknown{did_you_mean(name, shipped(), 'one of')}")
    print(shipped()[name].read_text(encoding="utf-8"), end="")


def _resolved(
    config: Path, overrides: list[str] | None, print_only: bool, *, one_run: bool = False
) -> Config:
    """The config of a command, which ends here if it is only to be printed."""
    with importing():
        from flowdopr.config import effective, load_config, to_yaml
    resolved = load_config(config, overrides or ())
    if print_only:
        print(to_yaml(effective(resolved) if one_run else resolved), end="")
        raise typer.Exit
    return resolved


def _tell(*lines: object) -> None:
    """Print results, such as the path of a file, once for all processes of a launch."""
    if os.environ.get("RANK", "0") == "0":
        print(*lines, sep="\n")


command = typer.main.get_command(app)
