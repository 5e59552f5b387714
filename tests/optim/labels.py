"""Optimizers by one word, such as "muon" or "dopr-muon", for tests that try all of them."""

import inspect

from flowdopr.optim import OPTIMIZER_NAMES, DoPr, build_optimizer

LABELS = (*OPTIMIZER_NAMES, *(f"dopr-{name}" for name in OPTIMIZER_NAMES if name != "kfac"))


def build(model, label, lr, **options):
    """The optimizer `label`; options that DoPr has go to DoPr where it is there."""
    if not label.startswith("dopr-"):
        return build_optimizer(model, label, lr, **options)
    keys = inspect.signature(DoPr).parameters.keys() & options.keys()
    dopr = {key: options.pop(key) for key in keys}
    return build_optimizer(model, label.removeprefix("dopr-"), lr, dopr=dopr, **options)
