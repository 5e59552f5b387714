"""Training that starts from the weights of another run: `train.init_from`."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from flowdopr.disk import file_sha256, read_tensors
from flowdopr.runs.folder import RunFolder

REMEDY = (
    "let train.init_from name a run folder or a safetensors file of this model's weights, such as "
    "RUN/checkpoints/step-00000500/model.safetensors"
)


def load_initial(model: nn.Module, init_from: str) -> dict[str, str]:
    """Give `model` the weights in `init_from`, in place.

    Args:
        init_from: a safetensors file, or a run folder, which stands for the average of its newest
            checkpoint that samples are drawn with.

    Returns:
        The file and its sha256, for versions.json.

    Raises:
        ConfigError, ValueError: no such file or checkpoint, or weights that do not fit the model.
    """
    path = Path(init_from)
    if path.is_dir():
        run = RunFolder.open(path)
        path = run.weights_file(run.chosen_step(), "ema")
    model.load_state_dict(read_tensors(path, REMEDY, model.state_dict()))
    return {"file": str(path.resolve()), "sha256": file_sha256(path)}
