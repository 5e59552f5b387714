"""The examples run; what they show needs more steps than a test has."""

import re
import runpy
import sys

import numpy as np
import pytest
import torch
from script_modules import SCRIPTS, load_script

from flowdopr.compare.own_task import DOPR, Trial

ADDITION = {"digits": 5, "base": 10, "steps": 60, "batch": 32, "width": 32, "depth": 1}
ADDITION |= {"heads": 2, "problems": 8}


def test_problems_have_the_right_answers():
    example = load_script("examples/language_model.py")
    lengths = torch.tensor([4, 5, 6])
    problems, answers = example.addition(lengths, 6, 10, torch.Generator().manual_seed(0))
    letters = "+=_0123456789"
    for problem, answer, n in zip(problems, answers, lengths.tolist(), strict=True):
        text = "".join(letters[token] for token in torch.cat([problem, answer])).replace("_", "")
        numbers, digits = text.split("=")
        assert [len(word) for word in numbers.split("+")] == [n] * 2
        assert len(digits) == n + 1
        assert sum(map(int, numbers.split("+"))) == int(digits[::-1])


def test_an_answer_is_right_if_all_of_its_own_digits_are():
    """A model that adds one to the digit before: rolled out, an error is carried on."""
    example = load_script("examples/language_model.py")

    def model(tokens):
        return torch.nn.functional.one_hot(tokens + 1, 13).float()

    answers = torch.tensor([[5, 6, 7, 2], [5, 6, 8, 2], [4, 5, 6, 7]])
    found = example.right(model, torch.tensor([[4]] * 3), answers)
    assert found.tolist() == [True, False, False]


@pytest.mark.parametrize("dopr", [None, DOPR])
def test_language_model_learns_digits(dopr):
    example = load_script("examples/language_model.py")
    trial = Trial("addition", "arm", "adamw", dopr, 1e-2, 0, ADDITION)
    first, *_, last = example.train(trial, "cpu")
    assert 0 < last["loss"] < first["loss"] - 0.2
    assert last["step"] == 60
    assert 0 < last["wrong"] < 1
    assert set(example.horizons(5)) < set(last)


@pytest.fixture
def examples(monkeypatch):
    """The examples import each other, and processes that they start must find them, too."""
    monkeypatch.syspath_prepend(SCRIPTS / "examples")


@pytest.fixture
def humanoid(examples):
    pytest.importorskip("gymnasium")
    return load_script("examples/humanoid.py")


def test_the_humanoids_pose_is_at_rest_and_falls_without_feedback(humanoid):
    expert = humanoid.expert()
    environment = humanoid.make_environment()
    environment.set_state(expert.pose, np.zeros(expert.model.nv))
    environment.step(expert.torques)
    assert np.abs(environment.data.qvel).max() < 1e-3
    torques = np.tile(expert.torques, (2, 1))
    episodes = humanoid.rollouts(lambda seen: torques[: len(seen)], 2, seed=0)
    assert all(one.fell and 20 < one.survived < 200 for one in episodes)


def test_the_expert_keeps_the_humanoid_upright(humanoid):
    episodes = list(humanoid.expert_rollouts(3, seed=20_000))  # those of robot_policy.py
    assert [one.survived for one in episodes] == [humanoid.EPISODE] * 3
    assert min(one.reward for one in episodes) > 4.5 * humanoid.EPISODE


@pytest.mark.parametrize("policy", ["mlp", "flow"])
def test_a_policy_learns_from_the_expert(humanoid, policy, tmp_path):
    example = load_script("examples/robot_policy.py")
    sizes = {"episodes": 12, "recorded_steps": 60, "rollouts": 2, "points": 5}
    settings = {"policy": policy, "steps": 120, "batch": 64, "width": 64, **sizes}
    trial = Trial("humanoid", "arm", "adamw", DOPR, 3e-3, 0, settings)
    first, *_, last = example.train(trial, tmp_path)
    assert 0 < last["loss"] < 0.9 * first["loss"]
    assert 20 < last["steps"] < humanoid.EPISODE
    assert last["fallen, 1000 steps"] == 2.5 / 3
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npz", ".npz"]


def test_chunks_hold_the_actions_after_each_observation(humanoid):
    example = load_script("examples/robot_policy.py")
    time = np.arange(5, dtype=np.float32)
    observations = time[None, :, None] + np.zeros((1, 1, 348), np.float32)
    actions = time[None, :, None] + np.zeros((1, 1, 17), np.float32)
    seen, chunks = example.chunks_of(observations, actions, 3)
    assert seen[:, 0].tolist() == [0, 1, 2]
    assert chunks.view(3, 3, 17)[:, :, 0].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]


@pytest.fixture
def llama(tmp_path):
    """A folder with a random Llama of two layers, whose tokens are letters."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {chr(code): code - 32 for code in range(32, 127)} | {"?": 95}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=96, **sizes, **heads)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("lora", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_causal_language_model_is_fine_tuned(llama, lora, monkeypatch, capsys):
    text, out = SCRIPTS.parent / "README.md", llama / "out"
    options = {"model": llama, "text": text, "lora": lora, "lr": 1e-2, "out": out}
    options |= {"steps": 20, "length": 32, "device": "cpu"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["finetune_causal_lm.py", *words])
    runpy.run_path(str(SCRIPTS / "examples" / "finetune_causal_lm.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["loss", "seconds a step", "MiB"]
    for line in lines:
        assert re.fullmatch(r"[a-zA-Z ]+: \S+ alone, \S+ with DoPr, \S+ times", line)
    losses = [float(number) for number in re.findall(r"\d+\.\d+", lines[0])]
    assert max(losses[:2]) < np.log(96)
    assert (out / ("adapter_model.safetensors" if lora else "model.safetensors")).exists()
