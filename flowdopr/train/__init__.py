"""Training: the loop, the weight average, checkpoints and the run folder."""

from flowdopr.train.ema import EMA, Average
from flowdopr.train.loop import Trainer
from flowdopr.train.run_folder import RunFolder
from flowdopr.train.signals import Interrupted, StopSignal, TrainingFailed
from flowdopr.train.start import train

__all__ = [
    "EMA",
    "Average",
    "Interrupted",
    "RunFolder",
    "StopSignal",
    "Trainer",
    "TrainingFailed",
    "train",
]
