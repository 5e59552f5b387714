"""Learning rate and seeds as pure functions of the step, so that checkpoints need not hold them."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np


def lr_factor(
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    decay: Literal["constant", "linear", "cosine", "cooldown"],
    cooldown_steps: int | None = None,
) -> float:
    """Factor on the peak learning rate for the step numbered `step` (from 0).

    Warm-up rises linearly and reaches 1 at step `warmup_steps - 1`; linear and cosine decay then
    fall towards 0, which they would reach at step `steps`. A cooldown falls linearly, too, over the
    last `cooldown_steps` (Hägele et al., arXiv 2405.18392): before it, the factor does not depend
    on `steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay == "constant":
        return 1.0
    if decay == "cooldown":
        return min(1.0, (steps - step) / (cooldown_steps or steps))
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 1.0 - done if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def is_due(step: int, every: int | None, last: int) -> bool:
    """Whether `step` is the `last` one, or one of `every` so many; None: of no others."""
    return step == last or (every is not None and step % every == 0)


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from integers; different integers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1
