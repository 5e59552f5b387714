"""Training: the loop, the weight average, checkpoints and the run folder."""

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
