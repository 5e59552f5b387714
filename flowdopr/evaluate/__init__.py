"""Measuring a trained run: one-step loss, distances to the real images, label accuracy, samples."""

from flowdopr.evaluate.classifier import trained_classifier
from flowdopr.evaluate.draw import sample
from flowdopr.evaluate.extractors import Extractor, classifier_extractor, inception_extractor
from flowdopr.evaluate.fidelity import fidelity
from flowdopr.evaluate.measure import evaluate

__all__ = [
    "Extractor",
    "classifier_extractor",
    "evaluate",
    "fidelity",
    "inception_extractor",
    "sample",
    "trained_classifier",
]
