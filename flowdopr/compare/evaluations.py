"""Which evaluation cards a run of a study needs, which are there, and making the others.

The last checkpoint is evaluated with every metric of the config, and with FD alone at each number
of solver steps; the checkpoints before it with FD alone, for the curves over training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from flowdopr.compare.plan import RunPlan
from flowdopr.config import apply_overrides
from flowdopr.evaluate.card import answers, card_settings
from flowdopr.runs.folder import RunFolder

Card = dict[str, Any]
FD_ONLY = ("evaluate.metrics=[fd]", "evaluate.bpd=null", "evaluate.excess=null")


@dataclass(frozen=True)
class CardRequest:
    """One evaluation: a checkpoint and what differs from the run's own settings."""

    step: int
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class WantedCards:
    """The cards a run needs, by what they are for."""

    final: CardRequest
    curve: tuple[CardRequest, ...]
    """By step; without the last checkpoint, which `final` covers."""
    by_nfe: tuple[CardRequest, ...]
    """By solver steps; where they are the run's own, it is `final`."""

    def all(self) -> list[CardRequest]:
        return list(dict.fromkeys([self.final, *self.curve, *self.by_nfe]))


def wanted_cards(plan: RunPlan) -> WantedCards:
    train, own_steps = plan.config.train, getattr(plan.config.sample.solver, "steps", None)
    final = CardRequest(train.steps)
    earlier = range(train.checkpoint_every or train.steps, train.steps, train.checkpoint_every or 1)
    kept = train.keep_checkpoints
    if kept is not None:
        earlier = earlier[max(0, len(earlier) - kept + 1) :]
    return WantedCards(
        final=final,
        curve=tuple(CardRequest(step, FD_ONLY) for step in earlier),
        by_nfe=tuple(
            final
            if steps == own_steps
            else CardRequest(train.steps, (*FD_ONLY, f"sample.solver.steps={steps}"))
            for steps in sorted(plan.nfe_steps)
        ),
    )


def known_cards(plan: RunPlan) -> dict[CardRequest, Card]:
    """The wanted cards that are in the run folder, whoever made them."""
    dataset = RunFolder.open(plan.path).dataset
    paths = sorted((plan.path / "evaluation").glob("*.json"))
    cards = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    found = {}
    for request in wanted_cards(plan).all():
        settings = card_settings(apply_overrides(plan.config, request.overrides), dataset)
        fitting = (card for card in cards if card["step"] == request.step)
        match = next((card for card in fitting if answers(card, settings)), None)
        if match is not None:
            found[request] = match
    return found


def missing_cards(plan: RunPlan) -> list[CardRequest]:
    """The wanted cards that are not there though their checkpoint is, in the order to make them."""
    known, steps = known_cards(plan), RunFolder.open(plan.path).steps()
    wanted = wanted_cards(plan).all()
    return [request for request in wanted if request not in known and request.step in steps]


def is_finished(plan: RunPlan) -> bool:
    """Whether nothing is left to do: trained to the last step, and evaluated."""
    if not (plan.path / "config.yaml").exists():
        return False
    trained = plan.config.train.steps in RunFolder.open(plan.path).steps()
    return trained and not missing_cards(plan)
