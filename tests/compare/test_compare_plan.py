"""A study's config becomes exactly the runs it names, or one line that says what is wrong."""

import pytest

from flowdopr.compare.plan import expand, reported
from flowdopr.config import ConfigError, DoPrConfig, apply_overrides


def arms(config, text):
    return apply_overrides(config, [f"compare.arms={text}"])


def test_every_arm_rate_and_seed_once(study):
    config = arms(study, "[{name: a, lrs: [1e-3]}, {name: b, lrs: [1e-5]}, {name: c, lrs: [1e7]}]")
    names = [plan.name for plan in expand(config)]
    first = ["a-lr0.001-s0", "b-lr1e-05-s0", "c-lr1e07-s0"]
    assert names == first + [name.replace("-s0", "-s1") for name in first]


def test_a_grid_is_crossed_with_the_rates(study):
    grid = "{optimizer.dopr.damping: [0.1, 10], optimizer.dopr.form: [inverse, sandwich]}"
    text = f"[{{name: a, lrs: [1e-3], set: {{optimizer.name: dopr-adamw}}, grid: {grid}}}]"
    tuned = apply_overrides(study, [f"compare.arms={text}", "compare.tuning_seeds=[9]"])
    plans = expand(tuned)
    assert [plan.name for plan in plans] == [
        f"a-lr0.001-damping{damping}-form{form}-s9"
        for damping in (0.1, 10)
        for form in ("inverse", "sandwich")
    ]
    assert plans[-1].config.optimizer.dopr == DoPrConfig(damping=10, form="sandwich")


def test_settings_of_a_grid_with_one_last_word_are_named_in_full(study):
    grid = "{flow.time.shift: [1, 2], sample.solver.grid.shift: [1, 2]}"
    solver = "sample.solver={name: euler, steps: 2, grid: {name: shifted}}"
    arms = f"[{{name: a, lrs: [1e-3], grid: {grid}}}]"
    tuned = [f"compare.arms={arms}", "compare.tuning_seeds=[9]", solver]
    names = [plan.name for plan in expand(apply_overrides(study, tuned))]
    assert names[1] == "a-lr0.001-flow.time.shift1-sample.solver.grid.shift2-s9"
    assert len(set(names)) == 4


@pytest.mark.parametrize(
    "where",
    [
        "set: {optimizer.lr: 1}",
        "set: {optimizer: {name: muon, lr: 1}}",
        "grid: {optimizer: [adamw, {name: muon, lr: 1}]}",
    ],
)
def test_an_arm_cannot_set_its_learning_rate(study, where):
    tuned = ["compare.tuning_seeds=[9]", f"compare.arms=[{{name: a, lrs: [1e-3, 1], {where}}}]"]
    config = apply_overrides(study, tuned)
    with pytest.raises(ConfigError, match=r"optimizer.lr: comes from the lrs of compare.arms"):
        expand(config)


def test_tuning_seeds_have_every_rate_and_reported_seeds_the_chosen_one(study):
    both = "[{name: a, lrs: [1e-3, 0.1]}, {name: b, lrs: [1e-5, 1e7]}]"
    config = apply_overrides(study, [f"compare.arms={both}", "compare.tuning_seeds=[5]"])
    plans = expand(config)
    assert all(plan.tuning for plan in plans)
    names = [plan.name for plan in plans]
    assert names == ["a-lr0.001-s5", "a-lr0.1-s5", "b-lr1e-05-s5", "b-lr1e07-s5"]
    chosen = reported(config, [plans[1]])
    assert [plan.name for plan in chosen] == ["a-lr0.1-s0", "a-lr0.1-s1"]
    assert not any(plan.tuning for plan in chosen)
    assert chosen[1].config == apply_overrides(plans[1].config, ["name=tiny/a-lr0.1-s1", "seed=1"])


@pytest.mark.parametrize(
    ("decay", "starts_from", "damping"),
    [
        (["train.lr_decay=linear"], None, (10, 1, 0.5)),
        (["train.lr_decay=cooldown", "train.cooldown_steps=2"], "a-lr0.001-s0", (10, 1, 4)),
    ],
)
def test_reported_runs_are_repeated_with_fewer_steps(study, decay, starts_from, damping):
    dopr = "{optimizer: {name: dopr-adamw, dopr: {damping: [10, 1, 0.5]}}}"
    config = apply_overrides(
        arms(study, f"[{{name: a, lrs: [1e-3], set: {dopr}}}]"),
        ["compare.seeds=[0]", "compare.train_steps=[6]", *decay],
    )
    long, short = reported(config, expand(config))
    assert [long.name, short.name] == ["a-lr0.001-s0", "a-lr0.001-s0-steps6"]
    assert (long.shorter, short.shorter) == (False, True)
    assert (long.starts_from, short.starts_from) == (None, starts_from)
    assert long.config.optimizer.dopr.damping == (10, 1, 0.5)
    changed = ["train.steps=6", f"optimizer.dopr.damping={list(damping)}"]
    assert short.config == apply_overrides(long.config, [f"name={short.config.name}", *changed])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["compare.train_steps=[8]"], ["'a'", "8 is not less than train.steps 8"]),
        (
            [
                *(decay := ["train.lr_decay=cooldown", "train.cooldown_steps=2"]),
                "compare.train_steps=[7]",
            ],
            ["'a'", "7 begins to cool down at step 5", "train.checkpoint_every"],
        ),
        (
            [*decay, "compare.train_steps=[6]", "train.keep_checkpoints=1"],
            ["'a'", "train.keep_checkpoints=null"],
        ),
        (["train.lr_decay=cooldown"], ["train.cooldown_steps", "set both or neither"]),
        (["train.cooldown_steps=2"], ["train.cooldown_steps", "set both or neither"]),
        (
            ["train.lr_decay=cooldown", "train.cooldown_steps=9"],
            ["train.cooldown_steps 9", "more than train.steps 8"],
        ),
        (
            ["compare.arms=[{name: a, lrs: [1]}, {name: b, lrs: [1, 2]}]"],
            ["'a' 1, 'b' 2", "each arm as many"],
        ),
        (["compare.widen=1"], ["compare.widen", "two learning rates"]),
        (["compare.train_steps=[5]", "train.warmup_steps=6"], ["'a'", "train.warmup_steps 6"]),
        (["compare.train_steps=[5, 5]"], ["compare.train_steps: 5 is given twice"]),
        (["compare.evaluation_seeds=[1, 1]"], ["compare.evaluation_seeds: 1 is given twice"]),
        (["compare.weights=[raw, ema-0.5]"], ["'a'", "no weights 'ema-0.5'; there are: raw, ema"]),
        (["evaluate.weights=posthoc-0.1"], ["'a'", "no weights 'posthoc-0.1'"]),
        (["compare.weights=[ema-0.9]"], ["'a'", "ema-0.9 and ema are the same"]),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_run(study, overrides, words):
    with pytest.raises(ConfigError) as caught:
        expand(apply_overrides(arms(study, "[{name: a, lrs: [1e-3]}]"), overrides))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("lrs", "tuning", "words"),
    [
        ("[1e-3, 0.1]", "[1]", "the seed 1 is given twice"),
        ("[1e-3, 0.1]", "[]", r"arms have 2 trials.* compare\.tuning_seeds=\[100\]$"),
        ("[0.1]", "[5]", "nothing to choose"),
    ],
)
def test_tuning_seeds_are_others_than_those_reported(study, lrs, tuning, words):
    with pytest.raises(ConfigError, match=words):
        apply_overrides(
            study, [f"compare.arms=[{{name: a, lrs: {lrs}}}]", f"compare.tuning_seeds={tuning}"]
        )


def test_the_folder_of_a_run_names_each_number_of_a_list(study):
    grid = "{optimizer.dopr.damping: [[100, 1, 0.5], [10, 1, 0.5]]}"
    arm = f"{{name: a, lrs: [1e-3], grid: {grid}, set: {{optimizer.name: dopr-adamw}}}}"
    config = apply_overrides(study, [f"compare.arms=[{arm}]", "compare.tuning_seeds=[5]"])
    names = [plan.name for plan in expand(config)]
    assert names == ["a-lr0.001-damping100-1-0.5-s5", "a-lr0.001-damping10-1-0.5-s5"]


def test_a_run_is_a_config_of_its_own(study):
    plan = next(plan for plan in expand(study) if plan.name == "DoPr-AdamW-lr0.001-s1")
    assert plan.config.optimizer.name == "adamw"
    assert plan.config.optimizer.dopr == DoPrConfig()
    assert (plan.config.optimizer.lr, plan.config.seed) == (1e-3, 1)
    assert plan.config.compare is None
    assert plan.path.parent.name == "tiny"
    assert plan.path.name == plan.name
    same = study.model_dump(exclude={"name", "seed", "optimizer", "compare"})
    assert plan.config.model_dump(exclude={"name", "seed", "optimizer", "compare"}) == same


def test_an_override_takes_mappings_and_lists(study):
    text = "[{name: a, lrs: [1e-3], set: {optimizer.betas: [0.8, 0.9], model.depth: 4}}]"
    plan = expand(arms(study, text))[0]
    assert plan.config.optimizer.betas == (0.8, 0.9)
    assert plan.config.model.depth == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("optimizer.weight_deca: 1", ["'a'", "optimizer.weight_deca", "'weight_decay'"]),
        ("optimizer.name: adam", ["'a'", "optimizer.name"]),
        ("train.steps: -1", ["'a'", "train.steps"]),
        ("optimizer.lr: 1e-3", ["'a'", "optimizer.lr", "lrs"]),
        ("seed: 3", ["'a'", "seed", "compare.seeds"]),
        ("data.image_size: 4", ["'a'", "data.image_size", "must keep the study's"]),
        ("evaluate: {}", ["'a'", "set evaluate", "must keep the study's"]),
        ("evaluate.fid_num_images: 50", ["'a'", "evaluate"]),
        ("compare.workers: 2", ["'a'", "compare.workers"]),
    ],
)
def test_a_wrong_override_names_its_arm(study, overrides, words):
    with pytest.raises(ConfigError) as caught:
        expand(arms(study, f"[{{name: a, lrs: [1e-3], set: {{{overrides}}}}}]"))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words)


def test_two_runs_never_share_a_folder(study):
    twins = "compare.arms=[{name: a, lrs: [1e-3, 0.001000000001]}]"
    config = apply_overrides(study, [twins, "compare.tuning_seeds=[5]"])
    with pytest.raises(ConfigError, match=r"a-lr0\.001-s5"):
        expand(config)


def test_a_study_needs_a_rollout_metric(study):
    with pytest.raises(ConfigError, match=r"evaluate\.metrics"):
        expand(apply_overrides(study, ["evaluate.metrics=[kid]"]))


@pytest.mark.parametrize("times", ["dopri5", "{name: euler, grid: [0.0, 0.4, 1.0]}"])
def test_numbers_of_steps_need_a_solver_that_heeds_them(study, times):
    changed = arms(study, f"[{{name: a, lrs: [1e-3], set: {{sample.solver: {times}}}}}]")
    with pytest.raises(ConfigError, match=r"^compare\.nfe_steps: in arm 'a' sample\.solver="):
        expand(changed)
    assert expand(apply_overrides(changed, ["compare.nfe_steps=[]"]))


@pytest.mark.parametrize(
    ("solver", "words"),
    [("eulr", "did you mean 'euler'"), ("dopri5", "steps"), ("euler", "of arm 'AdamW' already")],
)
def test_further_solvers_are_other_solvers_of_fixed_steps(study, solver, words):
    with pytest.raises(ConfigError, match=words):
        expand(apply_overrides(study, [f"compare.nfe_solvers=[{solver}]"]))


def test_a_config_without_a_study_is_refused(study):
    with pytest.raises(ConfigError, match=r"compare\.arms"):
        expand(apply_overrides(study, ["compare=null"]))
