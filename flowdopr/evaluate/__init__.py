"""Measuring a trained run: one-step loss, distances to the real images, label accuracy, samples."""

from flowdopr.evaluate.classifier import trained_classifier
from flowdopr.evaluate.draw import sample
from flowdopr.evaluate.extractors import Extractor, classifier_extractor, inception_extractor
from flowdopr.evaluate.fidelity import fidelity
from flowdopr.evaluate.generate import generate_images
from flowdopr.evaluate.measure import build_extractor, evaluate

__all__ = [
    "Extractor",
    "build_extractor",
    "classifier_extractor",
    "evaluate",
    "fidelity",
    "generate_images",
    "inception_extractor",
    "sample",
    "trained_classifier",
]
