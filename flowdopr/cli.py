"""The command line: `flowdopr train | sample | evaluate | compare | encode`.

Each command is one call into a room. Bad input ends with one line and exit code 2, a run that
failed with 1, a signal with 128 + its number, success with 0. Rooms are imported inside the
commands, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from flowdopr.exits import Commands, end, exit_code, one_line

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml.")
]
RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run folder, such as runs/quickstart.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[a.b=value ...]", help="Settings to change; docs/settings.md lists them all."
    ),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the resolved config as YAML, do nothing else.")
]

Solver = Annotated[
    str | None, typer.Option(help="torchdiffeq method or SDE solver, with its defaults.")
]
Steps = Annotated[int | None, typer.Option(help="Steps of a fixed-step solver.")]
Tolerance = Annotated[float | None, typer.Option(help="Tolerance of an adaptive solver.")]
GuidanceScale = Annotated[
    float | None, typer.Option(help="Guidance, classifier-free or by the guide.")
]
GuideRun = Annotated[
    str | None, typer.Option(help="Autoguidance by the model of this run folder, a worse one.")
]
GuideWeights = Annotated[str | None, typer.Option(help="Weights of the guide; default: ema.")]
GuideStep = Annotated[int | None, typer.Option(help="Checkpoint of the guide.")]
Seed = Annotated[
    int,
    typer.Option(
        min=0,
        help="Image i depends on the seed and i alone; with an adaptive solver, whose steps a "
        "batch shares, up to its tolerance.",
    ),
]
Checkpoint = Annotated[int | None, typer.Option(help="Checkpoint; default: the newest.")]
Weights = Annotated[
    str, typer.Option(help="Weights: ema, raw, an average's own name, or posthoc-LENGTH.")
]
Labels = Annotated[
    str | None, typer.Option(help="Class numbers, repeated over the images: 3 or 0,1,2.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flowdopr {version('flowdopr')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Flow-matching image generation that judges optimizers by their samples."""


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")
    ] = False,
    print_config: PrintConfig = False,
) -> None:
    """Train a model into the run folder <output>/<name>.

    Ctrl-C and SIGTERM save a checkpoint first; the same command with --resume goes on exactly where
    it stopped. Runs on several processes or GPUs under `accelerate launch -m flowdopr train ...`.
    """
    from flowdopr.config import load_config, to_yaml

    resolved = load_config(config, overrides or ())
    if print_config:
        print(to_yaml(resolved), end="")
        return
    from flowdopr.train import train as run

    _tell(run(resolved, resume=resume))


@app.command()
def sample(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="Folder for the images; new or empty.")],
    overrides: Overrides = None,
    num: Annotated[int, typer.Option(min=1, help="Number of images.")] = 64,
    solver: Solver = None,
    steps: Steps = None,
    atol: Tolerance = None,
    rtol: Tolerance = None,
    guidance_scale: GuidanceScale = None,
    guide_run: GuideRun = None,
    guide_weights: GuideWeights = None,
    guide_step: GuideStep = None,
    labels: Labels = None,
    seed: Seed = 0,
    step: Checkpoint = None,
    ema: Weights = "ema",
    batch_size: Annotated[int | None, typer.Option(help="Images at a time.")] = None,
    autoencoder: Annotated[
        str | None, typer.Option(help="Where the autoencoder of a run on latents lies now.")
    ] = None,
    npz: Annotated[
        bool, typer.Option("--npz", help="Also write samples.npz (arr_0: uint8, NHWC; labels).")
    ] = False,
) -> None:
    """Draw images from a run: numbered PNGs and grid.png. Options default to the run's config.

    Any setting of the section `sample` is given as sample.key=value, after the options' own.
    """
    from flowdopr.evaluate import sample as run_sample

    options = {
        "solver": solver,
        "solver.steps": steps,
        "solver.atol": atol,
        "solver.rtol": rtol,
        "guidance.scale": guidance_scale,
        "guidance.guide.run": guide_run,
        "guidance.guide.weights": guide_weights,
        "guidance.guide.step": guide_step,
        "batch_size": batch_size,
    }
    _tell(
        run_sample(
            run,
            [*_sample_overrides(options), *(overrides or ())],
            num=num,
            out=out,
            labels=_numbers(labels),
            seed=seed,
            step=step,
            weights=ema,
            npz=npz,
            autoencoder=autoencoder,
        )
    )


@app.command()
def evaluate(
    run: RunPath,
    overrides: Overrides = None,
    step: Checkpoint = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again what is known.")] = False,
) -> None:
    """Measure a run into a JSON card: one-step loss beside FD or FID, KID, precision, recall.

    Only settings of the sections `sample` and `evaluate` can be changed.
    """
    from flowdopr.evaluate import evaluate as run_evaluate

    path = run_evaluate(run, overrides or (), step=step, force=force)
    card = json.loads(path.read_text(encoding="utf-8"))
    for name, value in card["metrics"].items():
        if isinstance(value, int | float):
            print(f"{name:24} {value:.6g}")
    _tell(path)


@app.command()
def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default: compare.workers.")
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Only rebuild the report from what is there.")
    ] = False,
    print_config: PrintConfig = False,
) -> None:
    """Train every arm x learning rate x seed, evaluate each, and write report.html.

    What is done already is skipped and what was cut goes on, so the same command can be repeated.
    """
    from flowdopr.config import load_config, to_yaml

    resolved = load_config(config, overrides or ())
    if print_config:
        print(to_yaml(resolved), end="")
        return
    from flowdopr.compare import compare as run_compare

    run_compare(resolved, workers=workers, report_only=report_only)


@app.command()
def encode(
    config: ConfigFile,
    autoencoder: Annotated[
        str, typer.Option(help="Folder in diffusers' format, or a name on the Hugging Face hub.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the latents; a cut encoding goes on.")],
    overrides: Overrides = None,
    kept: Annotated[
        str, typer.Option(help="posterior: drawn anew each epoch; or mean.")
    ] = "posterior",
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    shard_size: Annotated[int, typer.Option(min=1, help="Images in a file.")] = 8192,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
) -> None:
    """Encode the images of CONFIG's section `data` once, for `data.name: latents`.

    Mirrored copies are encoded too where data.horizontal_flip is on. Needs flowdopr[latents].
    """
    from flowdopr.config import load_data_config
    from flowdopr.latents import encode as run_encode

    _tell(
        run_encode(
            load_data_config(config, overrides or ()),
            autoencoder=autoencoder,
            out=out,
            kept=kept,
            dtype=dtype,
            shard_size=shard_size,
            batch_size=batch_size,
        )
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run_command(arguments))


def run_command(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code. With FLOWDOPR_TRACEBACK=1 errors keep theirs."""
    command = typer.main.get_command(app)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return (
            command.main(arguments or ["--help"], prog_name="flowdopr", standalone_mode=False) or 0
        )
    except KeyboardInterrupt:
        return end("interrupted", 130)
    except Exception as error:
        if os.environ.get("FLOWDOPR_TRACEBACK"):
            raise
        code = exit_code(error)
        if code is None:
            raise
        return end(one_line(error), code)


def _tell(path: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(path)


def _sample_overrides(options: dict[str, object]) -> list[str]:
    """The given options as overrides of the section `sample`."""
    given = {key: value for key, value in options.items() if value is not None}
    return [f"sample.{key}={json.dumps(value)}" for key, value in given.items()]


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--labels {text}: write class numbers, such as 3 or 0,1,2") from None


if __name__ == "__main__":
    main()
