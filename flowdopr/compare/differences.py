"""The settings in which the arms of a study differ: all others are the same in every arm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from flowdopr.compare.formats import NONE, listing
from flowdopr.compare.statistics import ArmSummary
from flowdopr.config import to_dict
from flowdopr.runs.same import flat

OF_THE_RUN = ("name", "output", "seed")  # these differ between the runs of one arm, too


def differing_settings(arms: Sequence[ArmSummary]) -> dict[str, dict[str, str]]:
    """The settings that are not the same in the reported trials of all arms: by dotted key, the
    value in each arm, or a dash where it has no such setting."""
    settings = {arm.name: _settings(arm) for arm in arms}
    found = {}
    for key in sorted({key for one in settings.values() for key in one}):
        values = {name: _text(one.get(key, NONE)) for name, one in settings.items()}
        if len(set(values.values())) > 1:
            found[key] = values
    return found


def beyond_optimizer(arms: Sequence[ArmSummary]) -> list[str]:
    """A sentence for each group of arms that differ from the first arm, and those like it, in more
    than the section `optimizer`."""
    found = differing_settings(arms)
    other = {key: values for key, values in found.items() if not key.startswith("optimizer.")}
    groups: dict[tuple[str, ...], list[str]] = {}
    for arm in arms:
        groups.setdefault(tuple(values[arm.name] for values in other.values()), []).append(arm.name)
    (first, those), *others = groups.items()
    sentences = []
    for own, names in others:
        keys = [key for key, a, b in zip(other, first, own, strict=True) if a != b]
        sentences.append(
            f"Not only the optimizer differs: {listing(keys)} {'is' if len(keys) == 1 else 'are'} "
            f"not the same in {listing(names)} as in {listing(those)}."
        )
    return sentences


def _settings(arm: ArmSummary) -> dict[str, Any]:
    values = flat(to_dict(arm.reported.plan.config))
    return {key: value for key, value in values.items() if key not in OF_THE_RUN}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
