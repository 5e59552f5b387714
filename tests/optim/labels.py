"""Optimizers by one word, such as "muon" or "dopr-muon", or by the path of a class of another
package, for tests that try all of them."""

import inspect

from flowdopr.optim import OPTIMIZER_NAMES, DoPr, build_optimizer

OUTSIDE = ("schedulefree.AdamWScheduleFree", "pytorch_optimizer.Lion")
NAMES = (*(name for name in OPTIMIZER_NAMES if name != "outside"), *OUTSIDE)
LABELS = (*NAMES, *(f"dopr-{name}" for name in NAMES if name != "kfac"))


def build(model, label, lr, **options):
    """The optimizer `label`; options that DoPr has go to DoPr where it is there."""
    name = label.removeprefix("dopr-")
    if name in OUTSIDE:
        name, options = "outside", {"class_path": name, **options}
    if not label.startswith("dopr-"):
        return build_optimizer(model, name, lr, **options)
    keys = inspect.signature(DoPr).parameters.keys() & options.keys()
    dopr = {key: options.pop(key) for key in keys}
    return build_optimizer(model, name, lr, dopr=dopr, **options)
