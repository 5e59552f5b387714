"""The study's result in plain words, no stronger than its seeds allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowdopr.compare.formats import count, learning_rate, listing, mean_sd, number
from flowdopr.compare.results import RunResult
from flowdopr.compare.statistics import (
    FEWEST_SEEDS_FOR_A_CLAIM,
    ArmSummary,
    PairDifferences,
    PairedDifference,
    RateSummary,
    ranked,
)


@dataclass(frozen=True)
class Verdict:
    headline: str
    """Which arm had the best rollouts and which the lowest one-step loss."""
    pairs: list[str]
    """One sentence for each pair DoPr-X against X."""
    notes: list[str]
    """Tuning budgets, learning rates, unfinished and failed runs."""


def build_verdict(
    metric: str,
    runs: Sequence[RunResult],
    arms: Sequence[ArmSummary],
    differences: Sequence[PairDifferences],
) -> Verdict:
    """The verdict on `arms`; `metric` is the name of the rollout metric, FD or FID."""
    pairs = [_pair_sentence(*pair) for pair in differences]
    return Verdict(_headline(metric, arms), pairs, _notes(metric, runs, arms))


def _headline(metric: str, arms: Sequence[ArmSummary]) -> str:
    ranking = ranked(arms)
    if not ranking:
        return "No run is finished yet, so there is nothing to compare."
    (best, winner), *others = ranking
    if not others:
        seeds = count(best.n, "seed")
        return f"{winner.arm} alone has finished runs: {metric} {mean_sd(best, 3)} ({seeds})."
    sentence = f"The samples of {winner.arm} came closest to the data: {metric} {mean_sd(best, 3)}"
    field = listing([f"{rate.arm} ({mean_sd(fd, 3)})" for fd, rate in others])
    headline = f"{sentence}, ahead of {field}. {_loss_clause(winner, [r for _, r in ranking])}"
    fewest = min(fd.n for fd, _ in ranking)
    if fewest < FEWEST_SEEDS_FOR_A_CLAIM:
        headline += f" With {count(fewest, 'seed')} an arm this is an observation, not a claim."
    return headline


def _loss_clause(winner: RateSummary, ranking: Sequence[RateSummary]) -> str:
    losses = [(loss.mean, rate.arm) for rate in ranking if (loss := rate.spread("one_step_loss"))]
    if not losses:
        return ""
    loss, arm = min(losses)
    if arm == winner.arm:
        return f"It also had the lowest one-step loss ({number(loss)})."
    own = next(value for value, name in losses if name == winner.arm)
    return f"The lowest one-step loss was {arm}'s: {number(loss)}, against {number(own)}."


def _pair_sentence(fd: PairedDifference, loss: PairedDifference | None) -> str:
    changes = "; ".join(_change(difference) for difference in (fd, loss) if difference)
    return f"{fd.first} against {fd.second}: {changes}. {_strength(fd)}"


def _change(difference: PairedDifference) -> str:
    metric = difference.metric
    if difference.mean == 0:
        return f"{metric} equal"
    lower = difference.mean < 0
    agreeing = sum((value < 0) == lower for value in difference.by_seed.values() if value)
    word = "lower" if lower else "higher"
    amount = number(abs(difference.mean), 3)
    return f"{metric} {word} by {amount} ({word} in {agreeing} of {count(difference.n, 'seed')})"


def _strength(difference: PairedDifference) -> str:
    if not difference.enough_seeds:
        return f"{count(difference.n, 'seed').capitalize()}: too few for a claim."
    low, high = number(difference.low, 3), number(difference.high, 3)
    interval = f"The 95 % t-interval of the difference in {difference.metric}, {low} to {high},"
    if difference.shown:
        return f"{interval} leaves out zero."
    return f"{interval} includes zero: no difference is shown."


def _notes(metric: str, runs: Sequence[RunResult], arms: Sequence[ArmSummary]) -> list[str]:
    notes = [_budget(runs, arms), *_learning_rate_notes(metric, arms)]
    if any(len(arm.rates) > 1 for arm in arms):
        notes.append(
            "Learning rates were chosen on the seeds that are reported, which flatters every arm."
        )
    states = {"failed": "failed, which no mean includes", "unfinished": "not finished"}
    for status, words in states.items():
        names = [run.plan.name for run in runs if run.status == status]
        if names:
            notes.append(f"{count(len(names), 'run')} {words}: {listing(names)}.")
    not_started = sum(run.status == "not started" for run in runs)
    if not_started:
        notes.append(f"{count(not_started, 'run')} of {len(runs)} not started.")
    return notes


def _budget(runs: Sequence[RunResult], arms: Sequence[ArmSummary]) -> str:
    seeds = count(len({run.plan.seed for run in runs}), "seed")
    sizes = {arm.name: len(arm.rates) for arm in arms}
    if len(set(sizes.values())) <= 1:
        grid = count(next(iter(sizes.values()), 0), "learning rate")
        return f"Every arm had the same tuning budget: {grid} × {seeds}."
    each = listing([f"{arm} {count(size, 'learning rate')}" for arm, size in sizes.items()])
    return (
        f"The tuning budgets are not equal: {each}, × {seeds}. The comparison favours the larger."
    )


def _learning_rate_notes(metric: str, arms: Sequence[ArmSummary]) -> list[str]:
    notes = []
    for arm in arms:
        if len(arm.rates) < 2 or arm.tuned is None:
            continue
        chosen = learning_rate(arm.tuned.lr)
        if arm.tuned_by_loss and arm.tuned_by_loss.lr != arm.tuned.lr:
            other = learning_rate(arm.tuned_by_loss.lr)
            notes.append(
                f"{arm.name}: {metric} chose learning rate {chosen}; the one-step loss would have "
                f"chosen {other}."
            )
        if arm.tuned.lr in (arm.rates[0].lr, arm.rates[-1].lr):
            notes.append(
                f"{arm.name}: the chosen learning rate {chosen} is at the edge of its grid."
            )
    return notes
