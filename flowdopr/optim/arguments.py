"""Checks of DoPr's arguments: what is out of range, and which optimizers fit which form."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeGuard

import torch

from flowdopr.optim.dual import DualCase
from flowdopr.optim.kfac import KFAC
from flowdopr.optim.moments import precision
from flowdopr.optim.plan import Layer, LayerRule

# Optimizers, of torch and of other packages, whose steps depend on the weights themselves: on their
# norm, on a distance from where they started, on an average of them.
READS_WEIGHTS = re.compile(
    r"(?i)adafactor|asgd|lamb$|lars|larc|prodigy|dadapt|dowg|schedulefree|lookahead|a2grad|accsgd"
    r"|adasmooth|adalite|adamp$|amos|focus|ftrl|fromage|lorarite|madgrad|mars$|magma|nero|ranger"
    r"|sgdp|srmm"
)
# Those that evaluate the loss themselves, several times a step or for its second derivatives.
EVALUATES_LOSS = re.compile(r"(?i)lbfgs|sam$|alig|adahessian|sophiah")


def check(name: str, value: object, good: bool, allowed: str) -> None:
    """ValueError that names the argument of DoPr, its value and what it may be."""
    if not good:
        raise ValueError(f"DoPr: {name} is {value}, it must be {allowed}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a finite number, not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_anneal(anneal: object) -> None:
    """Like `check`, for None or (first, last) steps."""
    pair = anneal if isinstance(anneal, tuple | list) and len(anneal) == 2 else (0, 0)
    good = anneal is None or (all(is_number(step) for step in pair) and 0 <= pair[0] < pair[1])
    check("anneal", anneal, good, "(first, last) steps, first below last")


def check_whole(name: str, value: object) -> None:
    """Like `check`, for a whole number of 1 or more."""
    good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    check(name, value, good, "a whole number of 1 or more")


def check_optimizer(optimizer: torch.optim.Optimizer, form: str) -> None:
    """ValueError for an optimizer that cannot be wrapped, or not under this form."""
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"DoPr: wraps a torch optimizer, got {kind}: DoPr(optimizer, model)")
    if kind == "DoPr":
        raise ValueError("DoPr: the optimizer is a DoPr already: wrap the one inside it")
    if isinstance(optimizer, KFAC):
        raise ValueError("DoPr: KFAC preconditions by layer inputs itself: use it alone")
    if EVALUATES_LOSS.search(kind):
        raise ValueError(
            f"DoPr: {kind} evaluates the loss itself within a step, and those gradients would not "
            "be preconditioned: wrap another optimizer"
        )
    if form == "sandwich" and READS_WEIGHTS.search(kind):
        raise ValueError(
            f"DoPr: form 'sandwich' runs the optimizer from weights of zero, and {kind} reads "
            "them: use form 'inverse', or an optimizer such as SGD, AdamW or Muon"
        )


def damping_schedule(damping: float | tuple[float, float, int]) -> tuple[float, float, int]:
    """(first, last, steps) of a number or such a triple."""
    triple = damping if isinstance(damping, tuple | list) else (damping, damping, 1)
    known = len(triple) == 3 and all(is_number(value) for value in triple)
    check("damping", damping, known, "a number or (first, last, steps)")
    first, last, steps = triple
    check("damping", damping, min(first, last) >= 0 and steps >= 1, "0 or more")
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
    check("rules", rules, isinstance(rules, list | tuple), "a list of layer rules")
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
            cuts = rule.mode in ("auto", "blocks", "sua", "sua-mean")
            check("max_side of a rule", rule.max_side, cuts, f"null with mode {rule.mode!r}")
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
