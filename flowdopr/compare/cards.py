"""The evaluation cards of a run: those that the study wants, and those that its folder holds.

The last checkpoint is evaluated with every metric of the config, and with FD alone at each number
of solver steps; the checkpoints before it with FD alone, for the curves over training; and all of
them with FD alone for each further weight average. Of a shorter run only the end counts, and of one
that chooses a trial only FD there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowdopr.compare.plan import RunPlan
from flowdopr.config import apply_overrides
from flowdopr.evaluate.card import answers, card_settings, read_card
from flowdopr.runs import RunFolder, check_same_run, kept_steps

Card = dict[str, Any]
FD_ONLY = (
    "evaluate.metrics=[fd]",
    "evaluate.bpd=null",
    "evaluate.excess=null",
    "evaluate.drift=null",
    "evaluate.gallery=0",
)


@dataclass(frozen=True)
class CardRequest:
    """One evaluation: a checkpoint and what differs from the run's own settings."""

    step: int
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class WantedCards:
    """The evaluations that the study wants of a run, by their use."""

    final: CardRequest
    """The last checkpoint with the run's own settings."""
    curve: tuple[CardRequest, ...]
    """The checkpoints before the last one, by step."""
    by_nfe: tuple[CardRequest, ...]
    """The last checkpoint at each number of steps of each solver; `final` at the run's own."""
    by_noise: tuple[CardRequest, ...]
    """The last checkpoint with each further evaluation seed."""
    by_weights: dict[str, tuple[CardRequest, ...]]
    """All checkpoints, by step, with each further weight average."""

    def all(self) -> list[CardRequest]:
        averages = [one for requests in self.by_weights.values() for one in requests]
        wanted = [self.final, *self.curve, *self.by_nfe, *self.by_noise, *averages]
        return list(dict.fromkeys(wanted))


def wanted_cards(plan: RunPlan) -> WantedCards:
    last = plan.config.train.steps
    if plan.tuning:
        return WantedCards(CardRequest(last, FD_ONLY), (), (), (), {})
    steps = (last,) if plan.shorter else _checkpoints(plan)
    by_weights = {
        weights: tuple(
            CardRequest(step, (*FD_ONLY, f"evaluate.weights={weights}")) for step in steps
        )
        for weights in plan.weights
    }
    if plan.shorter:
        return WantedCards(CardRequest(last, FD_ONLY), (), (), (), by_weights)
    final, own_steps = CardRequest(last), getattr(plan.config.sample.solver, "steps", None)
    of_steps = [
        final if steps == own_steps else _with_last(plan, f"sample.solver.steps={steps}")
        for steps in sorted(plan.nfe_steps)
    ]
    of_solvers = [
        _with_last(plan, f"sample.solver={{name: {solver}, steps: {steps}}}")
        for solver in plan.nfe_solvers
        for steps in sorted(plan.nfe_steps)
    ]
    return WantedCards(
        final=final,
        curve=tuple(CardRequest(step, FD_ONLY) for step in steps[:-1]),
        by_nfe=(*of_steps, *of_solvers),
        by_noise=tuple(_with_last(plan, f"evaluate.seed={seed}") for seed in plan.evaluation_seeds),
        by_weights=by_weights,
    )


def _with_last(plan: RunPlan, override: str) -> CardRequest:
    """FD of the last checkpoint with one more override."""
    return CardRequest(plan.config.train.steps, (*FD_ONLY, override))


def _checkpoints(plan: RunPlan) -> tuple[int, ...]:
    """Steps of the checkpoints that a finished run is sure to have, ascending."""
    train = plan.config.train
    every = train.checkpoint_every or train.steps
    steps = (*range(every, train.steps, every), train.steps)
    return tuple(sorted(kept_steps(steps, train)))


@dataclass(frozen=True)
class RunSnapshot:
    """A planned run and the contents of its folder when `read_run` read it."""

    plan: RunPlan
    folder: RunFolder | None
    """None while the run has not started."""
    steps: tuple[int, ...]
    """Steps of the checkpoints, ascending."""
    wanted: WantedCards
    cards: dict[CardRequest, Card]
    """The wanted cards in the folder, made by the study or by `flowdopr evaluate`."""

    @property
    def missing(self) -> list[CardRequest]:
        """The wanted cards that are not there, of checkpoints that are, in order."""
        wanted = self.wanted.all()
        return [card for card in wanted if card not in self.cards and card.step in self.steps]

    @property
    def finished(self) -> bool:
        """Whether the run is trained to its last step and evaluated."""
        return self.plan.config.train.steps in self.steps and not self.missing


def read_run(plan: RunPlan) -> RunSnapshot:
    """Read the run folder of `plan`, if there is one.

    Raises:
        ConfigError: the folder holds a run of another config.
    """
    wanted = wanted_cards(plan)
    if not (plan.path / "config.yaml").exists():
        return RunSnapshot(plan, None, (), wanted, {})
    folder = RunFolder.open(plan.path)
    check_same_run(folder, plan.config, folder.dataset)
    cards = _cards_in(folder, plan, wanted.all())
    return RunSnapshot(plan, folder, tuple(folder.steps()), wanted, cards)


def _cards_in(
    folder: RunFolder, plan: RunPlan, requests: list[CardRequest]
) -> dict[CardRequest, Card]:
    paths = sorted((folder.path / "evaluation").glob("*.json"))
    cards = [card for path in paths if (card := read_card(path)) is not None]
    settings = {
        overrides: card_settings(apply_overrides(plan.config, overrides), folder.dataset)
        for overrides in {request.overrides for request in requests}
    }
    return {
        request: card
        for request in requests
        for card in reversed(cards)  # of several cards that fit, the first one is kept
        if card["step"] == request.step and answers(card, settings[request.overrides])
    }
