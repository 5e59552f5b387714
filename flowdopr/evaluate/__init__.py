"""Measuring a trained run: one-step loss, distances to the real images, label accuracy, samples."""

from flowdopr.callable_package import make_callable
from flowdopr.evaluate.classifier import trained_classifier
from flowdopr.evaluate.draw import sample, sample_overrides
from flowdopr.evaluate.extractors import (
    Extractor,
    Features,
    classifier_extractor,
    inception_extractor,
)
from flowdopr.evaluate.fidelity import fidelity, reference_features
from flowdopr.evaluate.gallery import Gallery
from flowdopr.evaluate.generate import RolloutsFailed
from flowdopr.evaluate.measure import Evaluator, evaluate
from flowdopr.evaluate.real import RealImages

__all__ = [
    "Evaluator",
    "Extractor",
    "Features",
    "Gallery",
    "RealImages",
    "RolloutsFailed",
    "classifier_extractor",
    "evaluate",
    "fidelity",
    "inception_extractor",
    "reference_features",
    "sample",
    "sample_overrides",
    "trained_classifier",
]

make_callable(__name__)
