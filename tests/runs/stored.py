"""Run folders whose checkpoints hold one number, the step: no model is trained."""

import torch

from flowdopr.data import DatasetInfo
from flowdopr.runs import RunFolder, averages_of

INFO = DatasetInfo("digits", (1, 8, 8), 2, ("a", "b"), 10, 5, fingerprint="0" * 64)


def save(run: RunFolder, *steps: int) -> RunFolder:
    for step in steps:
        run.append_metrics({"step": step, "loss": 0.5})
        weights = {"w": torch.tensor([float(step)])}
        averages = {average.name: weights for average in averages_of(run.config)}
        state = {"losses": weights["w"], "optimizer": {"state": {}}, "scaler": None}
        run.save_checkpoint(step, model=weights, averages=averages, state=state, note={})
    return run
