"""The examples run; what they show needs more steps than a test has."""

import pytest
import torch
from script_modules import load_script

from flowdopr.compare.own_task import DOPR, Trial

ADDITION = {"digits": 5, "steps": 60, "batch": 32, "width": 32, "depth": 1}
ADDITION |= {"heads": 2, "problems": 8}


def test_problems_have_the_right_answers():
    example = load_script("examples/language_model.py")
    lengths = torch.tensor([4, 5, 6])
    problems, answers = example.addition(lengths, 6, torch.Generator().manual_seed(0))
    letters = "0123456789+="
    for problem, answer, n in zip(problems.tolist(), answers.tolist(), lengths, strict=True):
        numbers = "".join(letters[i] for i in problem if i != example.BLANK).strip("=").split("+")
        digits = [i for i in answer if i != example.BLANK]
        assert [len(word) for word in numbers] == [n] * 2
        assert len(digits) == n + 1
        assert sum(map(int, numbers)) == sum(d * 10**k for k, d in enumerate(digits))


def test_an_answer_is_right_if_all_of_its_own_digits_are():
    """A model that adds one to the digit before: rolled out, an error is carried on."""
    example = load_script("examples/language_model.py")

    def model(tokens):
        return torch.nn.functional.one_hot((tokens + 1) % 10, 13).float()

    answers = torch.tensor([[4, 5, 6, 12], [4, 5, 7, 12], [3, 4, 5, 6]])
    found = example.right(model, torch.tensor([[3]] * 3), answers)
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
