"""The study's result in plain words, no stronger than its seeds allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowdopr.compare.formats import count, learning_rate, listing, mean_sd, number
from flowdopr.compare.results import RunResult
from flowdopr.compare.statistics import (
    FEWEST_SEEDS_FOR_A_CLAIM,
    ArmSummary,
    Cell,
    PairedDifference,
    matched_pairs,
    paired_difference,
)


@dataclass(frozen=True)
class Verdict:
    headline: str
    """Which arm had the best rollouts and which the lowest one-step loss."""
    pairs: list[str]
    """One sentence for each pair DoPr-X against X."""
    notes: list[str]
    """Tuning budgets, learning rates, unfinished and failed runs."""


def verdict(runs: Sequence[RunResult], summaries: Sequence[ArmSummary]) -> Verdict:
    metric = metric_name(runs)
    pairs = [
        _pair_sentence(metric, *differences) for differences in pair_differences(runs, summaries)
    ]
    return Verdict(_headline(metric, summaries), pairs, _notes(metric, runs, summaries))


def metric_name(runs: Sequence[RunResult]) -> str:
    """`FID` or `FD`, as the evaluated runs have it."""
    return next((run.metric for run in runs if run.final), "FD")


def pair_differences(
    runs: Sequence[RunResult], summaries: Sequence[ArmSummary]
) -> list[tuple[PairedDifference, PairedDifference | None]]:
    """The difference in FD and in one-step loss of each matched pair that shares a seed."""
    found = []
    for first, second in matched_pairs(summaries):
        if first.tuned is None or second.tuned is None:
            continue
        tuned = (first.tuned, second.tuned)
        fd = paired_difference(metric_name(runs), *tuned, lambda run: run.fd)
        loss = paired_difference("one-step loss", *tuned, lambda run: run.one_step_loss)
        if fd is not None:
            found.append((fd, loss))
    return found


def _headline(metric: str, summaries: Sequence[ArmSummary]) -> str:
    ranked = [(spread, cell) for arm in summaries if (cell := arm.tuned) and (spread := cell.fd)]
    if not ranked:
        return "No run is finished yet, so there is nothing to compare."
    ranked.sort(key=lambda pair: pair[0].mean)
    (best, winner), *others = ranked
    if not others:
        seeds = count(best.n, "seed")
        return f"{winner.arm} alone has finished runs: {metric} {mean_sd(best, 3)} ({seeds})."
    sentence = f"The samples of {winner.arm} came closest to the data: {metric} {mean_sd(best, 3)}"
    field = listing([f"{cell.arm} ({mean_sd(spread, 3)})" for spread, cell in others])
    fewest = min(spread.n for spread, _ in ranked)
    caution = (
        f" With {count(fewest, 'seed')} an arm this is an observation, not a claim."
        if fewest < FEWEST_SEEDS_FOR_A_CLAIM
        else ""
    )
    return f"{sentence}, ahead of {field}. {_loss_clause(winner, ranked)}{caution}"


def _loss_clause(winner: Cell, ranked: list) -> str:
    losses = [(loss.mean, cell.arm) for _, cell in ranked if (loss := cell.one_step_loss)]
    if not losses:
        return ""
    loss, arm = min(losses)
    if arm == winner.arm:
        return f"It also had the lowest one-step loss ({number(loss)})."
    own = next(value for value, name in losses if name == winner.arm)
    return f"The lowest one-step loss was {arm}'s: {number(loss)}, against {number(own)}."


def _pair_sentence(metric: str, fd: PairedDifference, loss: PairedDifference | None) -> str:
    parts = [_change(metric, fd)]
    if loss is not None:
        parts.append(_change("one-step loss", loss))
    return f"{fd.first} against {fd.second}: {'; '.join(parts)}. {_strength(metric, fd)}"


def _change(metric: str, difference: PairedDifference) -> str:
    if difference.mean == 0:
        return f"{metric} equal"
    lower = difference.mean < 0
    agreeing = sum((value < 0) == lower for value in difference.by_seed.values() if value)
    word = "lower" if lower else "higher"
    amount = number(abs(difference.mean), 3)
    return f"{metric} {word} by {amount} ({word} in {agreeing} of {count(difference.n, 'seed')})"


def _strength(metric: str, difference: PairedDifference) -> str:
    if not difference.enough_seeds:
        return f"{count(difference.n, 'seed').capitalize()}: too few for a claim."
    low, high = number(difference.low, 3), number(difference.high, 3)
    interval = f"The 95 % t-interval of the difference in {metric}, {low} to {high},"
    if difference.shown:
        return f"{interval} leaves out zero."
    return f"{interval} includes zero: no difference is shown."


def _notes(metric: str, runs: Sequence[RunResult], summaries: Sequence[ArmSummary]) -> list[str]:
    notes = [_budget(runs, summaries), *_learning_rate_notes(metric, summaries)]
    if any(len(arm.cells) > 1 for arm in summaries):
        notes.append(
            "Learning rates were chosen on the seeds that are reported, which flatters every arm."
        )
    for status, words in (("failed", "failed"), ("unfinished", "not finished")):
        names = [run.name for run in runs if run.status == status]
        if names:
            notes.append(f"{count(len(names), 'run')} {words}: {listing(names)}.")
    waiting = sum(run.status == "not started" for run in runs)
    if waiting:
        notes.append(f"{count(waiting, 'run')} of {len(runs)} not started.")
    return notes


def _budget(runs: Sequence[RunResult], summaries: Sequence[ArmSummary]) -> str:
    seeds = count(len({run.seed for run in runs}), "seed")
    sizes = {arm.arm: len(arm.cells) for arm in summaries}
    if len(set(sizes.values())) <= 1:
        grid = count(next(iter(sizes.values()), 0), "learning rate")
        return f"Every arm had the same tuning budget: {grid} × {seeds}."
    each = listing([f"{arm} {count(size, 'learning rate')}" for arm, size in sizes.items()])
    return (
        f"The tuning budgets are not equal: {each}, × {seeds}. The comparison favours the larger."
    )


def _learning_rate_notes(metric: str, summaries: Sequence[ArmSummary]) -> list[str]:
    notes = []
    for arm in summaries:
        if len(arm.cells) < 2 or arm.tuned is None:
            continue
        chosen = learning_rate(arm.tuned.lr)
        if arm.tuned_by_loss and arm.tuned_by_loss.lr != arm.tuned.lr:
            other = learning_rate(arm.tuned_by_loss.lr)
            notes.append(
                f"{arm.arm}: {metric} chose learning rate {chosen}; the one-step loss would have "
                f"chosen {other}."
            )
        if arm.tuned.lr in (arm.cells[0].lr, arm.cells[-1].lr):
            notes.append(
                f"{arm.arm}: the chosen learning rate {chosen} is at the edge of its grid."
            )
    return notes
