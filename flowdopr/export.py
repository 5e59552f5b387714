"""`flowdopr export`: a model of a run as a folder that can be given to others.

model.safetensors   the weights, with the config in the header; `flowdopr.load` reads it
README.md           a model card in the form of the Hugging Face Hub
samples.png         the sample grid of the run's training at this step, if there is one
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from flowdopr.config import to_yaml
from flowdopr.config.yaml12 import dump_yaml
from flowdopr.disk import replacing_folder
from flowdopr.evaluate.card import read_card
from flowdopr.models.weights import tensors_sha256
from flowdopr.runs import RunFolder, file_of, write_exported

MODEL, CARD, PICTURE = "model.safetensors", "README.md", "samples.png"
NOT_MEASURED = "These weights were not evaluated; `flowdopr evaluate` measures them.\n"

USE = """\
## Use

The weights, and the config that they were trained with, are in `{model}`.

```python
import flowdopr

model = flowdopr.load("{model}")
images = model.sample(16, seed=0)  # (16, {shape}), within [-1, 1]
for number, picture in enumerate(model.to_pil(images)):
    picture.save(f"{{number}}.png")
```

`flowdopr sample {model} --num 16 --out images` does the same, and
`flowdopr train CONFIG train.init_from={model}` trains on.
"""


def export(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    weights: str = "ema",
    license: str = "unknown",
) -> Path:
    """Write the model of a run into the new folder `out`, which is returned.

    Args:
        step: the checkpoint; None: the newest.
        weights: as `RunFolder.load_weights`.
        license: of the weights, one of the Hub's short names, for the model card.

    Raises:
        ConfigError, ValueError: no such run, checkpoint or weights, or `out` holds files.
    """
    folder, out = RunFolder.open(run), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is there already; choose another --out")
    model, step = folder.load_model(step, weights)
    # Cloned, because tied weights share memory, which safetensors does not take.
    found = {name: value.clone() for name, value in model.state_dict().items()}
    named = weights == "raw" or weights.startswith("posthoc-")
    own = weights if named else file_of(folder.config, weights)
    drawn = folder.path / "samples" / f"step-{step:08d}.png"
    with replacing_folder(out) as part:
        write_exported(part / MODEL, folder, found, step=step, weights=own)
        if has_picture := drawn.is_file() and own == file_of(folder.config, "ema"):
            shutil.copyfile(drawn, part / PICTURE)
        cards = list(_cards(folder, step, tensors_sha256(found)))
        text = model_card(folder, model, step, own, cards, license, has_picture)
        (part / CARD).write_text(text, encoding="utf-8")
    return out


def _cards(run: RunFolder, step: int, sha256: str) -> Iterable[dict[str, Any]]:
    """The evaluation cards of exactly these weights."""
    for path in sorted((run.path / "evaluation").glob(f"step-{step:08d}-*.json")):
        card = read_card(path)
        if card is not None and card["checkpoint"].get("sha256") == sha256:
            yield card


def model_card(
    run: RunFolder,
    model: nn.Module,
    step: int,
    weights: str,
    cards: Sequence[Mapping[str, Any]],
    license: str,
    has_picture: bool,
) -> str:
    """The README.md of a model, whose front matter the Hub reads."""
    config, info = run.config, run.dataset
    dopr = getattr(config.optimizer, "dopr", None) is not None
    optimizer = ("dopr-" if dopr else "") + config.optimizer.name
    shape = ", ".join(map(str, info.image_shape))
    front = {
        "license": license,
        "library_name": "flowdopr",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["flow-matching", config.model.name, optimizer, info.name],
    }
    parameters, latents = sum(p.numel() for p in model.parameters()), info.autoencoder
    initial = config.train.init_from
    what = f"latents ({shape}) of the autoencoder `{latents['name']}`" if latents else "images"
    parts = [
        f"---\n{dump_yaml(front)}---\n",
        f"# {config.name}\n",
        f"A {type(model).__name__} of {parameters:,} parameters that draws {what} like those of "
        f"{info.name}, trained by flow matching with {optimizer} for {step:,} steps of "
        f"{config.train.global_batch_size} images. The weights are `{weights}`.\n",
        f"Training began with the weights `{initial}`.\n" if initial else "",
        f"![Images that the model draws]({PICTURE})\n" if has_picture else "",
        USE.format(model=MODEL, shape=shape),
        "## Metrics\n",
        *(map(_metrics, cards) if cards else [NOT_MEASURED]),
        f"## Config\n\n```yaml\n{to_yaml(config)}```\n",
    ]
    return "\n".join(part for part in parts if part)


def _metrics(card: Mapping[str, Any]) -> str:
    """The numbers of an evaluation card, after what they depend on."""
    sampling, reference = card["sampling"], card.get("reference", {})
    guidance = sampling.get("guidance")
    how = (
        f"{sampling['num_images']:,} images by {sampling['solver']['name']} with "
        f"{sampling['nfe']:g} model calls each, "
        + (f"guidance {guidance['scale']:g}" if guidance else "without guidance")
        + f". Features: {card['extractor'].get('space', 'none')}. Reference: "
        + ", ".join(f"{key} {value}" for key, value in reference.items())
    )
    numbers = card["metrics"].items()
    rows = [f"| {name} | {value:.6g} |\n" for name, value in numbers if isinstance(value, float)]
    return f"{how}.\n\n| metric | value |\n|---|---|\n{''.join(rows)}"
