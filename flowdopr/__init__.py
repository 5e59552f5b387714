"""flowdopr: flow-matching image generation that judges optimizers by their samples.

    flowdopr.train(config), flowdopr.evaluate(run), flowdopr.compare(config)    the commands
    flowdopr.load(run)                      a model that samples
    flowdopr.optim, flowdopr.flow           for modules and loops of your own

`flowdopr.api` has the functions, docs/python.md examples. The packages, in the order the data walks
through them: `config`, `data`, `flow`, `models`, `optim`, `train`, `evaluate`, `compare`.
`docs/architecture.md` draws the way.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowdopr.api import TrainedModel, compare, evaluate, load, train

__version__ = "0.1.0"
__all__ = ["TrainedModel", "compare", "evaluate", "load", "train"]


def __getattr__(name: str) -> Any:
    """What is imported when it is asked for: torch takes seconds, and Ctrl-C must find the command
    ready at once."""
    from importlib import import_module

    if name in ("train", "evaluate", "compare"):  # packages that callable_package.py lets be called
        return import_module(f"flowdopr.{name}")
    if name in __all__:
        return getattr(import_module("flowdopr.api"), name)
    raise AttributeError(f"module 'flowdopr' has no attribute '{name}'")
