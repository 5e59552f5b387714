"""DoPr in a language model: a transformer learns to add, judged by the sums that it writes itself.

    python scripts/examples/language_model.py --workers 2 --out addition

The text of a problem of n digits is `a+b=c`: a and b as usual, and the n + 1 digits of c from the
lowest to the highest, so that each digit needs two digits of the problem and the carry, which
follows from the digits before it. n is random. The larger the base of the numbers, the more sums of
two digits there are to learn. Each arm is measured on two numbers:

    loss    nats per digit of c on held-out problems, given the right digits before it
    wrong   share of held-out problems whose c, written digit by digit by the model itself, is not
            right in every digit; half a problem is added, so that its logarithm exists

AdamW, Muon and SOAP are compared, each alone and in DoPr, with equally many learning rates and the
same seeds (flowdopr/compare/own_task.py). Finished runs in OUT/runs.jsonl are not repeated.
Problems of one digit are all seen in training, so the shortest has two.

Shapes: digits (B, N) int64 from the lowest to the highest, tokens (B, T) int64, logits (B, T, V).
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdopr.compare.own_report import write_report
from flowdopr.compare.own_task import OwnTask, Point, Trial, fit, run_study, with_and_without_dopr
from flowdopr.optim import build_optimizer
from flowdopr.train.schedule import derive_seed

PLUS, EQUALS, BLANK, SIGNS = 0, 1, 2, 3  # tokens; those of digits follow
SHORTEST = 2
LEARNING_RATES = {
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2),
    "muon": (6e-4, 2e-3, 6e-3, 2e-2),
    "soap": (1e-3, 3e-3, 1e-2, 3e-2),
}


def addition(
    lengths: Tensor, longest: int, base: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Problems (B, 2 (longest + 1)) and answers (B, longest + 1), with blanks for digits that are
    not there.

    Args:
        lengths: (B,), the number of digits of both numbers of a problem.
    """
    size, device = len(lengths), lengths.device
    places = torch.arange(longest + 1, device=device)
    digits = torch.randint(base, (size, 2, longest), generator=generator, device=device)
    there = places[:-1] < lengths[:, None, None]
    sums = F.pad(digits.where(there, 0).sum(1), (0, 1))
    for place in range(longest):
        sums[:, place + 1] += sums[:, place] // base
    answer = (SIGNS + sums % base).where(places <= lengths[:, None], BLANK)
    signs = torch.tensor([PLUS, EQUALS], device=device)[:, None].expand(size, -1, 1)
    problem = torch.cat([(SIGNS + digits).where(there, BLANK).flip(2), signs], 2)
    return problem.flatten(1), answer


class Block(nn.Module):
    """Pre-norm causal attention and MLP; `fused_blocks` lets Muon see q, k and v apart."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.qkv.fused_blocks = 3
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        heads = self.qkv(self.norm_1(x)).view(batch, time, 3, self.heads, -1).transpose(1, 3)
        q, k, v = heads.unbind(2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    def __init__(self, tokens: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))


def answer_loss(model: nn.Module, problem: Tensor, answer: Tensor) -> Tensor:
    """Mean nats per digit of the answers, given the right digits before it."""
    logits = model(torch.cat([problem, answer[:, :-1]], 1))[:, problem.shape[1] - 1 :]
    return F.cross_entropy(logits.flatten(0, 1), answer.flatten(), ignore_index=BLANK)


def right(model: nn.Module, problem: Tensor, answer: Tensor) -> Tensor:
    """(B,) bool: whether the model, given its own digits, writes every digit of the answer."""
    tokens = problem
    for _ in range(answer.shape[1]):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    written = tokens[:, problem.shape[1] :]
    return ((written == answer) | (answer == BLANK)).all(1)


def train(trial: Trial, device: str) -> Iterator[Point]:
    """One run."""
    options = trial.settings
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(derive_seed(trial.seed, 0))
    longest, base = options["digits"], options["base"]
    lengths = torch.arange(SHORTEST, longest + 1, device=device)
    sizes = (options["width"], options["depth"], options["heads"])
    model = Transformer(SIGNS + base, 3 * (longest + 1), *sizes)
    model.to(device)
    optimizer = build_optimizer(model, trial.gp, trial.lr, weight_decay=0.01, dopr=trial.dopr)
    generator = torch.Generator(device).manual_seed(derive_seed(trial.seed, 1))
    fixed = torch.Generator(device).manual_seed(derive_seed(trial.seed, 2))
    held_out = [addition(n.expand(options["problems"]), longest, base, fixed) for n in lengths]

    def batch_loss() -> Tensor:
        shape = (options["batch"],)
        chosen = torch.randint(len(lengths), shape, generator=generator, device=device)
        return answer_loss(model, *addition(lengths[chosen], longest, base, generator))

    def measure() -> Point:
        problems, answers = (torch.cat(parts) for parts in zip(*held_out, strict=True))
        wrong = (~right(model, problems, answers)).float().view(len(lengths), -1).sum(1)
        shares = (wrong + 0.5) / (options["problems"] + 1)
        by_length = dict(zip(horizons(longest), shares.tolist(), strict=True))
        loss = answer_loss(model, problems, answers).item()
        return {"loss": loss, "wrong": shares.mean().item(), **by_length}

    yield from fit(model, optimizer, batch_loss, measure, steps=options["steps"])


def horizons(longest: int) -> tuple[str, ...]:
    """Names of the share of wrong answers by their number of digits."""
    return tuple(f"wrong, {n + 1} digits" for n in range(SHORTEST, longest + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--digits", type=int, default=6, help="of the longest numbers")
    add("--base", type=int, default=32, help="of the numbers: how many digits there are")
    add("--steps", type=int, default=400, help="of training")
    add("--batch", type=int, default=64, help="problems in a batch")
    add("--width", type=int, default=168, help="of the transformer")
    add("--depth", type=int, default=3, help="of the transformer")
    add("--heads", type=int, default=4, help="of its attention")
    add("--problems", type=int, default=192, help="held-out problems of each length")
    add("--gps", nargs="+", default=[*LEARNING_RATES], choices=LEARNING_RATES, help="optimizers")
    add("--lrs", type=float, nargs="+", help="learning rates to try; default: each optimizer's own")
    add("--seeds", type=int, default=5, help="number of reported seeds")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of all runs")
    add("--workers", type=int, default=1, help="runs at the same time")
    add("--out", type=Path, default=Path("addition"), help="output folder")
    options = parser.parse_args()
    names = ("digits", "base", "steps", "batch", "width", "depth", "heads", "problems")
    task = OwnTask(
        "addition",
        partial(train, device=options.device),
        settings={name: getattr(options, name) for name in names},
        rollout="wrong",
        horizons=horizons(options.digits),
    )
    arms = with_and_without_dopr({gp: options.lrs or LEARNING_RATES[gp] for gp in options.gps})
    results = options.out / "runs.jsonl"
    seeds = range(options.seeds)
    runs = run_study(task, arms, results, seeds=seeds, workers=options.workers)
    print(write_report(task, runs, options.out))


if __name__ == "__main__":
    main()
