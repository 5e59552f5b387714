"""Checks of DoPr's arguments: what is out of range, and which optimizers fit which form."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from flowdopr.optim.dual import DualCase
from flowdopr.optim.kfac import KFAC
from flowdopr.optim.moments import precision
from flowdopr.optim.plan import Layer, LayerRule

# Optimizers, of torch and of other packages, whose steps depend on the weights themselves: on their
# norm, on a distance from where they started, on an average of them.
READS_WEIGHTS = re.compile(
    r"(?i)adafactor|asgd|lamb$|lars|larc|novograd|prodigy|dadapt|dowg|schedulefree|sam$|lookahead"
)


def check(name: str, value: object, good: bool, allowed: str) -> None:
    """ValueError that names the argument of DoPr, its value and what it may be."""
    if not good:
        raise ValueError(f"DoPr: {name} is {value}, it must be {allowed}")


def check_whole(name: str, value: object) -> None:
    """Like `check`, for a whole number of 1 or more."""
    good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    check(name, value, good, "a whole number of 1 or more")


def check_optimizer(optimizer: torch.optim.Optimizer, form: str) -> None:
    """ValueError for an optimizer that cannot be wrapped, or not under this form."""
    kind = type(optimizer).__name__
    if isinstance(optimizer, KFAC):
        raise ValueError("DoPr: KFAC preconditions by layer inputs itself: use it alone")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "DoPr: LBFGS evaluates the loss several times a step, and its gradients in between "
            "would not be preconditioned: wrap another optimizer"
        )
    if form == "sandwich" and READS_WEIGHTS.search(kind):
        raise ValueError(
            f"DoPr: form 'sandwich' runs the optimizer from weights of zero, and {kind} reads "
            "them: use form 'inverse', or an optimizer such as SGD, AdamW or Muon"
        )


def damping_schedule(damping: float | tuple[float, float, int]) -> tuple[float, float, int]:
    """(first, last, steps) of a number or such a triple."""
    first, last, steps = damping if isinstance(damping, tuple | list) else (damping, damping, 1)
    good = 0 <= min(first, last) <= max(first, last) < float("inf") and steps >= 1
    check("damping", damping, good, "0 or more and finite")
    check("damping", damping, first == last or min(first, last) > 0, "above 0 to be scheduled")
    return first, last, steps


def row_limit(max_rows: int | str | None) -> int | None:
    """None for "all"."""
    if max_rows is None or max_rows == "all":
        return None
    good = isinstance(max_rows, int) and max_rows >= 1
    check("max_rows", max_rows, good, "1 or more, or 'all'")
    return int(max_rows)


def layer_rules(rules: Sequence[LayerRule | Mapping[str, Any]]) -> list[LayerRule]:
    """Rules from rules or mappings of their fields; ValueError for a wrong field or pattern."""
    known = [field.name for field in fields(LayerRule)]
    named = []
    for rule in rules:
        if not isinstance(rule, LayerRule):
            wrong = [key for key in rule if key not in known]
            if wrong or "pattern" not in rule:
                what = f"has no field {wrong[0]!r}" if wrong else "needs a pattern"
                raise ValueError(f"a layer rule {what}: its fields are {', '.join(known)}")
            rule = LayerRule(**rule)
        try:
            re.compile(rule.pattern)
        except re.error as error:
            raise ValueError(
                f"layer rule {rule.pattern!r}: not a regular expression ({error}); correct it"
            ) from None
        if rule.max_side is not None:
            check_whole("max_side of a rule", rule.max_side)
        named.append(rule)
    return named


def check_dual(layers: Sequence[Layer], plain: bool, damping: float) -> None:
    """ValueError for a layer in the dual form, unless AP is the `plain` damped inverse and its
    lowest damping leaves some digits of the difference that the form takes."""
    for layer in layers:
        least = 1000 * torch.finfo(precision(layer.parameters[0])).eps
        if isinstance(layer.case, DualCase) and not (plain and damping >= least):
            raise ValueError(
                f"DoPr: layer {layer.name!r} has mode 'dual', which needs form 'inverse', power 1 "
                f"and damping of {least:.1e} or more: change these or give it another mode"
            )
