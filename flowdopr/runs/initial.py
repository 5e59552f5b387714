"""Training that starts from the weights of another run: `train.init_from`."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from flowdopr.disk import check_fit, file_sha256, read_tensors
from flowdopr.models import pc_layers, update_spectral_norms
from flowdopr.runs.folder import RunFolder

REMEDY = (
    "let train.init_from name a run folder or a safetensors file of this model's weights, such as "
    "RUN/checkpoints/step-00000500/model.safetensors"
)


def load_initial(model: nn.Module, init_from: str) -> dict[str, str]:
    """Give `model` the weights in `init_from`, in place.

    Args:
        init_from: a safetensors file, or a run folder, which stands for the average of its newest
            checkpoint that samples are drawn with. A model without PC layers gets the merged
            weights of a run that has them.

    Returns:
        The file and its sha256, for versions.json.

    Raises:
        ConfigError, ValueError: no such file or checkpoint, or weights that do not fit the model.
    """
    path, wanted = Path(init_from), model.state_dict()
    run = RunFolder.open(path) if path.is_dir() else None
    if run is not None:
        path = run.weights_file(run.chosen_step(), "ema")
    if run is not None and run.config.model.pc and not pc_layers(model):
        found = run.load_model()[0].state_dict()
        check_fit(found, wanted, path, REMEDY)
    else:
        found = read_tensors(path, REMEDY, wanted)
    model.load_state_dict(found)
    update_spectral_norms(model)
    return {"file": str(path.resolve()), "sha256": file_sha256(path)}
