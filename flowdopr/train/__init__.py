"""Training: from a config to a finished run, the loop, weight averages and the log."""

from flowdopr.callable_package import make_callable
from flowdopr.train.ema import EMA
from flowdopr.train.loop import Trainer
from flowdopr.train.signals import Interrupted, StopSignal, TrainingFailed
from flowdopr.train.start import train

__all__ = [
    "EMA",
    "Interrupted",
    "StopSignal",
    "Trainer",
    "TrainingFailed",
    "train",
]

make_callable(__name__)
