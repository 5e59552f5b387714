"""DoPr in a language model: a small character transformer, judged by the text it writes itself.

    python scripts/examples/language_model.py

The text is the Python language reference, which ships with Python (`pydoc_data.topics`). A
gradient preconditioner (GP) is compared with DoPr around it, on two numbers:

    one-step loss   nats per character on held-out text, given the true text before it
    rollout         how much of the text it writes from its own characters is not made of words of
                    the reference (share of written words that the whole text does not contain)

Both arms get the same learning rates, steps and seeds; the rate with the best mean rollout is
reported, and the one-step losses are those of the same runs.

Shapes: tokens (B, T) int64, logits (B, T, V).
"""

import argparse
import re
import statistics
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdopr.optim import build_optimizer

CONTEXT, WIDTH, HEADS, DEPTH, BATCH = 48, 64, 4, 2, 32
TEXTS, LENGTH = 32, 200  # of one rollout
LETTERS = "abcdefghijklmnopqrstuvwxyz .,()'-\n"


def load_text() -> str:
    """The reference as lower-case letters and plain punctuation, with single blanks."""
    text = "\n".join(topics[name] for name in sorted(topics)).lower()
    text = re.sub(f"[^{re.escape(LETTERS)}]", " ", text)
    return re.sub(r"\s*\n\s*", "\n", re.sub(" +", " ", text))


class Block(nn.Module):
    """Pre-norm causal attention and MLP; `fused_blocks` lets Muon see q, k and v apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.qkv.fused_blocks = 3
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        heads = self.qkv(self.norm_1(x)).view(batch, time, 3, HEADS, -1).transpose(1, 3)
        q, k, v = heads.unbind(2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, time, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class CharacterModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(LETTERS), WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(LETTERS))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.characters(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def windows(data: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` random windows of CONTEXT characters, and the same shifted by one."""
    starts = torch.randint(len(data) - CONTEXT - 1, (count, 1), generator=generator)
    rows = data[starts + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def write(
    model: CharacterModel, prompts: Tensor, length: int, generator: torch.Generator
) -> list[str]:
    """Roll the model out on its own characters, sampling at temperature 1."""
    tokens = prompts
    for _ in range(length):
        probabilities = model(tokens[:, -CONTEXT:])[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return ["".join(LETTERS[i] for i in row) for row in tokens[:, prompts.shape[1] :].tolist()]


def unknown_words(texts: list[str], vocabulary: set[str]) -> float:
    """Share of the whole words (first and last of each text may be cut) not in `vocabulary`."""
    words = [word for text in texts for word in re.findall("[a-z]+", text)[1:-1]]
    return sum(word not in vocabulary for word in words) / max(1, len(words))


def train(gp: str, dopr: bool, lr: float, seed: int, steps: int, text: str) -> dict[str, float]:
    """One run: its held-out one-step loss and its rollout."""
    torch.manual_seed(seed)
    data = torch.tensor([LETTERS.index(letter) for letter in text])
    training, held_out = data[: int(0.9 * len(data))], data[int(0.9 * len(data)) :]
    model = CharacterModel()
    # a short run changes its layer inputs fast: statistics of the last refreshes serve best
    ap = {"cov_decay": 0.5} if dopr else None
    optimizer = build_optimizer(model, gp, lr, weight_decay=0.01, dopr=ap)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens, following = windows(training, BATCH, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), following.flatten()).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    fixed = torch.Generator().manual_seed(12345)
    tokens, following = windows(held_out, 256, fixed)
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens).flatten(0, 1), following.flatten()).item()
    texts = write(model, windows(held_out, TEXTS, fixed)[0], LENGTH, fixed)
    vocabulary = set(re.findall("[a-z]+", text))
    return {"one-step loss": loss, "unknown words": unknown_words(texts, vocabulary)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gp", default="adamw", help="adamw, muon, signum, ...")
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-2, 3e-2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    text = load_text()
    for dopr in (False, True):
        tried = []
        for lr in options.lrs:
            runs = [
                train(options.gp, dopr, lr, seed, options.steps, text)
                for seed in range(options.seeds)
            ]
            tried.append((statistics.mean(run["unknown words"] for run in runs), lr, runs))
        _, lr, runs = min(tried, key=lambda entry: entry[:2])
        name = f"dopr-{options.gp}" if dopr else options.gp
        print(f"{name}, lr {lr:g} of {len(tried)}, {len(runs)} seeds")
        for measure in runs[0]:
            values = [run[measure] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"  {measure:14s} {statistics.mean(values):.4f} ± {spread:.4f}", flush=True)


if __name__ == "__main__":
    main()
