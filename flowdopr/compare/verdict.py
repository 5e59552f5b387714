"""The study's result in plain words, no stronger than its seeds allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from flowdopr.compare.claims import FEWEST_SEEDS, Claim
from flowdopr.compare.differences import beyond_optimizer
from flowdopr.compare.formats import count, listing, mean_sd, number, tried
from flowdopr.compare.results import RunResult
from flowdopr.compare.statistics import (
    ONE_STEP_LOSS,
    ArmSummary,
    Comparisons,
    Spread,
    TrialSummary,
    matched_pairs,
    rank_correlations,
    ranked,
)

NOTABLY = 0.99  # a metric at another number of model calls is named if its ratio is below


@dataclass(frozen=True)
class Verdict:
    headline: str
    """Which arm had the best rollouts, if that is shown, and which the lowest one-step loss."""
    pairs: list[str]
    """One sentence for each pair DoPr-X against X."""
    notes: list[str]
    """Tuning budgets, learning rates, unfinished and failed runs."""


def build_verdict(
    metric: str,
    runs: Sequence[RunResult],
    arms: Sequence[ArmSummary],
    comparisons: Comparisons,
) -> Verdict:
    """The verdict on `arms`; `metric` is the name of the rollout metric, FD or FID."""
    number_of_claims = sum(one.p_holm is not None for one in comparisons.all())
    sentences = [_pair_sentence(pair, number_of_claims) for pair in comparisons.pairs]
    return Verdict(
        _headline(metric, arms, comparisons), sentences, _notes(metric, runs, arms, comparisons)
    )


def _headline(metric: str, arms: Sequence[ArmSummary], comparisons: Comparisons) -> str:
    ranking = ranked(arms)
    if not ranking:
        return "No run has finished, so there is nothing to compare."
    best, winner = ranking[0]
    sentences = [_ranking_sentence(metric, ranking, comparisons), *_missing(arms)]
    if len(ranking) == 1:
        seeds = count(best.n, "seed")
        sentences[0] = (
            f"{winner.arm} alone has finished runs: {metric} {mean_sd(best, 3)} ({seeds})."
        )
    else:
        sentences.insert(1, _loss_sentence(winner, [trial for _, trial in ranking]))
        fewest = min(fd.n for fd, _ in ranking)
        if fewest < FEWEST_SEEDS:
            few = count(fewest, "seed")
            sentences.append(f"With {few} an arm this is an observation, not a claim.")
    return " ".join(filter(None, sentences))


def _ranking_sentence(
    metric: str, ranking: Sequence[tuple[Spread, TrialSummary]], comparisons: Comparisons
) -> str:
    """The arm of the lowest mean, or those that share it, and the arms that are shown to be worse.

    All comparisons are paired by seed, the mean is not: of seeds that failed, or are far apart, the
    lowest mean can be that of an arm which is shown to be worse.
    """
    best = ranking[0][0]
    leaders = [trial.arm for fd, trial in ranking if fd.mean == best.mean]
    worse = set.intersection(*(comparisons.worse_than(arm) for arm in leaders))
    words: dict[str, list[str]] = {"worse": [], "better": [], "level": []}
    for fd, trial in ranking[len(leaders) :]:
        beats = comparisons.worse_than(trial.arm) & set(leaders)
        kind = "worse" if trial.arm in worse else "better" if beats else "level"
        words[kind].append(f"{trial.arm} ({mean_sd(fd, 3)})")
    shown = f"{metric}, {mean_sd(best, 3)}"
    if len(leaders) == 1 and not words["level"] and not words["better"]:
        return (
            f"The samples of {leaders[0]} are closest to the data: {metric} {mean_sd(best, 3)}, "
            f"ahead of {listing(words['worse'])}."
        )
    verb, are = ("had", "is") if len(leaders) == 1 else ("share", "are")
    sentence = f"{listing(leaders)} {verb} the lowest mean {shown}"
    if words["worse"]:
        sentence += f", ahead of {listing(words['worse'])}"
    if words["level"]:
        sentence += f", but {are} not told apart from {listing(words['level'])}"
    if words["better"]:
        verb = "is" if len(words["better"]) == 1 else "are"
        sentence += f"; paired by seed, {listing(words['better'])} {verb} shown to be lower"
    return sentence + "."


def _loss_sentence(winner: TrialSummary, trials: Sequence[TrialSummary]) -> str:
    losses = {one.arm: loss.mean for one in trials if (loss := one.spread("one_step_loss"))}
    if not losses:
        return ""
    lowest = number(min(losses.values()))
    arms = [arm for arm, loss in losses.items() if number(loss) == lowest]
    if winner.arm not in losses:
        return f"The lowest mean one-step loss was {listing(arms)}'s: {lowest}."
    if len(arms) == len(trials):
        return f"The mean one-step loss of all is the same: {lowest}."
    if winner.arm in arms:
        return f"Its mean one-step loss is the lowest, too: {lowest}."
    own = number(losses[winner.arm])
    return f"The lowest mean one-step loss was {listing(arms)}'s: {lowest}, against {own}."


def _missing(arms: Sequence[ArmSummary]) -> list[str]:
    """Arms that are in no comparison, and seeds that are in no mean because they failed."""
    sentences = [f"No run of {arm.name} has finished." for arm in arms if arm.tuned is None]
    return sentences + [
        f"{one.failed} of the {count(one.failed + len(one.runs), 'seed')} of {one.arm} failed and "
        f"{'are' if one.failed > 1 else 'is'} in no mean."
        for arm in arms
        if (one := arm.tuned) and one.failed
    ]


def _pair_sentence(claims: Sequence[Claim], number_of_claims: int) -> str:
    first = claims[0]
    ratios = "; ".join(_ratio(one) for one in claims)
    return f"{first.first} over {first.second}: {ratios}. {_strength(claims, number_of_claims)}"


def _ratio(one: Claim) -> str:
    if one.interval is None:
        return f"{one.measure} {number(one.ratio, 3)}"
    low, high = (number(end, 3) for end in one.interval)
    return f"{one.measure} {number(one.ratio, 3)} ({low} to {high})"


def _strength(claims: Sequence[Claim], number_of_claims: int) -> str:
    tested = [one for one in claims if one.measure != ONE_STEP_LOSS]
    enough = [one for one in tested if one.seeds >= FEWEST_SEEDS]
    few = [
        f"{one.measure}: {count(one.seeds, 'seed')}, too few for a claim."
        for one in tested
        if one not in enough
    ]
    if not enough:
        return (
            f"{count(max(one.seeds for one in claims), 'seed').capitalize()}: too few for a claim."
        )
    words = [
        f"{one.measure} is {'lower' if one.ratio < 1 else 'higher'} (p = {number(one.p_holm, 2)})"
        for one in enough
        if one.shown
    ]
    correction = f"after Holm's correction over {count(number_of_claims, 'claim')}"
    if words:
        return " ".join([f"Shown {correction}: {listing(words)}.", *few])
    widest = max(one.smallest_seen(number_of_claims) or 1.0 for one in enough)
    seeds = count(min(one.seeds for one in enough), "seed")
    hidden = (
        f"ratios between {number(1 / widest, 3)} and {number(widest, 3)} could not have been seen"
    )
    return " ".join(
        [f"No difference is shown {correction}; with this spread of {seeds}, {hidden}.", *few]
    )


def _notes(
    metric: str, runs: Sequence[RunResult], arms: Sequence[ArmSummary], comparisons: Comparisons
) -> list[str]:
    notes = [*beyond_optimizer(arms), _budget(runs, arms), *_choice_notes(metric, arms)]
    notes += (
        _correlation_note(metric, arms) + _better_notes(metric, arms) + _bias_note(metric, arms)
    )
    paired = {(pair[0].first, pair[0].second) for pair in comparisons.pairs}
    notes += [
        f"{first.name} over {second.name}: no ratio, because in no seed both have a positive "
        f"{metric}."
        for first, second in matched_pairs(arms)
        if first.tuned and second.tuned and (first.name, second.name) not in paired
    ]
    states = {"failed": "failed, which no mean includes", "unfinished": "not finished"}
    for status, words in states.items():
        names = [run.plan.name for run in runs if run.status == status]
        if names:
            notes.append(f"{count(len(names), 'run')} {words}: {listing(names)}.")
    not_started = sum(run.status == "not started" for run in runs)
    if not_started:
        notes.append(f"{count(not_started, 'run')} of {len(runs)} not started.")
    return notes


def _correlation_note(metric: str, arms: Sequence[ArmSummary]) -> list[str]:
    found = rank_correlations(arms)
    if "" not in found:
        return []
    within = [f"{number(rho, 2)} within {arm}" for arm, rho in found.items() if arm]
    over_all = f"{number(found[''], 2)} over all runs"
    return [
        f"Rank correlation of the one-step loss with {metric} at the ends of runs: "
        f"{listing([over_all, *within])}."
    ]


def _better_notes(metric: str, arms: Sequence[ArmSummary]) -> list[str]:
    """Where other model calls, another solver or other weights draw better than in the table."""
    notes = []
    for arm in arms:
        values: dict[str, list[float]] = {}
        for run in arm.reported.runs:
            calls = [
                (f"{one.nfe:g} model calls of {one.solver}", one) for one in run.by_nfe if one.nfe
            ]
            ends = [
                (f"the weights {name}", curve[-1])
                for name, curve in run.by_weights.items()
                if curve
            ]
            for words, one in (*calls, *ends):
                if one.fd is not None:
                    values.setdefault(words, []).append(one.fd)
        means = {words: mean(found) for words, found in values.items()}
        own = arm.reported.spread("fd")
        best = min(means, key=means.__getitem__, default=None)
        if best is not None and own is not None and means[best] < NOTABLY * own.mean:
            notes.append(
                f"{arm.name}: {metric} is lower with {best}, {number(means[best], 3)}, than in the "
                "table."
            )
    return notes


def _bias_note(metric: str, arms: Sequence[ArmSummary]) -> list[str]:
    """By how much the number of images raises the metric of each arm."""
    raised, counts = [], set()
    for arm in arms:
        fd, limit = arm.reported.spread("fd"), arm.reported.spread("fd_infinity")
        if fd is not None and limit is not None:
            raised.append(f"{number(fd.mean - limit.mean, 2)} for {arm.name}")
            counts |= {run.final.num_images for run in arm.reported.runs if run.final}
    if not raised:
        return []
    images = listing([count(images, "image") for images in sorted(filter(None, counts))])
    return [
        f"{metric} is biased upward by the number of images: that of {images} is higher than that "
        f"of infinitely many, by extrapolation, by {listing(raised)}."
    ]


def _searched(arms: Sequence[ArmSummary]) -> str:
    """What the trials differ in."""
    return "trials" if any(arm.plan.searched for arm in arms) else "learning rates"


def _budget(runs: Sequence[RunResult], arms: Sequence[ArmSummary]) -> str:
    tuning = {run.plan.seed for run in runs if run.plan.tuning}
    if not tuning:
        return "Each arm has one trial, which its config gives: this study tuned nothing."
    seeds = count(len(tuning), "tuning seed")
    sizes, thing = {arm.name: len(arm.trials) for arm in arms}, _searched(arms).removesuffix("s")
    if len(set(sizes.values())) <= 1:
        grid = count(next(iter(sizes.values()), 0), thing)
        return f"Every arm had the same tuning budget: {grid} × {seeds}."
    each = listing([f"{arm} {count(size, thing)}" for arm, size in sizes.items()])
    return (
        f"The tuning budgets are not equal: {each}, × {seeds}. The comparison favours the larger."
    )


def _choice_notes(metric: str, arms: Sequence[ArmSummary]) -> list[str]:
    notes = []
    for arm in arms:
        chosen, other = arm.chosen, arm.tuned_by_loss
        if chosen is None:
            continue
        if other and other.trial != chosen.trial:
            notes.append(
                f"{arm.name}: {metric} chose learning rate {tried(chosen)}; the one-step loss "
                f"would have chosen {tried(other)}."
            )
        notes += [
            f"{arm.name}: the chosen {what} {value:g} is at the edge of its grid."
            for what, value in _at_the_edge(arm.trials, chosen)
        ]
    return notes


def _at_the_edge(trials: Sequence[TrialSummary], chosen: TrialSummary) -> list[tuple[str, float]]:
    """The settings of `chosen` that no trial goes beyond on one side, of those with an order."""
    grids = {"learning rate": [one.lr for one in trials]}
    grids |= {key: [one.plan.searched[key] for one in trials] for key in chosen.plan.searched}
    values = {"learning rate": chosen.lr, **chosen.plan.searched}
    ordered = {
        key: grid
        for key, grid in grids.items()
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in grid)
    }
    return [
        (key, values[key])
        for key, grid in ordered.items()
        if len(set(grid)) > 1 and values[key] in (min(grid), max(grid))
    ]
