"""What each update does to each direction of a linear model of the velocity, in closed form.

    python scripts/known_answer_theory.py

The model is v = W x, W (D, D), trained on the linear path x_t = (1-t) x_0 + t x_1 at times of some
law, with x_0 ~ N(0, 1) and x_1 ~ N(0, R diag(lambda) R^T). With means over the law of times,

    s_k = E (1-t)^2 + lambda_k E t^2      second moment of x_t along direction k (column k of R)
    c_k = lambda_k E t - E (1-t)          that of x_1 - x_0 with x_t
    w_k = c_k / s_k                       gain of the best linear velocity                      (1)

The gradient of half the expected squared error is (W - R diag(w) R^T) R diag(s) R^T. Started at
W = 0, W stays of the form R diag(g) R^T, and each of these updates moves every gain g_k by itself.
With the error e_k(n) = g_k(n) - w_k after n steps of the exact gradient,

    gradient descent      e_k(n) = (1 - lr s_k)^n e_k(0)                                        (2)
    AP, damping gamma     e_k(n) = (1 - lr (1 + gamma) s_k / (s_k / m + gamma))^n e_k(0),
                          m = mean of s                                                         (3)
    orthogonal (Muon)     g_k(n) = sign(w_k) min(n lr, |w_k|), to within lr                      (4)
    sign (Signum, Adam)   as (4), but only where R = 1                                          (5)

(4) needs the exact polar factor, no momentum and a square W. There AP before Muon changes nothing:
G S^-1 and G have the same singular vectors and signs, and Muon sees only these. So where the
directions of the inputs are those of the error, AP can help gradient descent and not Muon. What it
does for Muon comes from noise in the gradient, from momentum, from the approximate polar factor, or
from inputs whose directions are not those of the error.
"""

import numpy as np
import torch

from flowdopr.flow import TimeSampler

POINTS = 100_000  # of the law of times, evenly spaced in probability
DAMPINGS = (1.0, 0.1)


def band(start: float, end: float) -> np.ndarray:
    """Times (POINTS,) that stand for the uniform law between `start` and `end`."""
    return start + (end - start) * (np.arange(POINTS) + 0.5) / POINTS


def times_of(law: TimeSampler) -> np.ndarray:
    """Times (POINTS,) that stand for a law of training times."""
    return law.quantile(torch.from_numpy(band(0, 1))).numpy()


def moments(variances: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """s and c of (1), each (D,), averaged over the times `t`."""
    s = np.mean((1 - t) ** 2) + variances * np.mean(t**2)
    return s, variances * t.mean() - (1 - t).mean()


def gradient_descent(s: np.ndarray, w: np.ndarray, lr: float, steps: int) -> np.ndarray:
    """Gains after `steps` from 0, equation (2)."""
    return w - w * (1 - lr * s) ** steps


def preconditioned(
    s: np.ndarray, w: np.ndarray, lr: float, steps: int, damping: float
) -> np.ndarray:
    """Gains after `steps` from 0, equation (3)."""
    return w - w * (1 - lr * rates(s, damping)) ** steps


def rates(s: np.ndarray, damping: float) -> np.ndarray:
    """(1 + gamma) s_k / (s_k / m + gamma): by this AP contracts the errors per unit of lr."""
    return (1 + damping) * s / (s / s.mean() + damping)


def orthogonal(w: np.ndarray, lr: float, steps: int) -> np.ndarray:
    """Gains after `steps` from 0, equations (4) and (5)."""
    return np.sign(w) * np.minimum(steps * lr, np.abs(w))


def table(conditions: tuple[float, ...] = (1e2, 1e4), dim: int = 64) -> str:
    """The ratio of the fastest to the slowest rate of (2) and (3), and the largest gain, to which
    the steps of (4) are proportional, as a table in Markdown."""
    laws = {
        "t < 0.1": band(0, 0.1),
        "all t": band(0, 1),
        "uniform t with shift 0.1": times_of(TimeSampler(shift=0.1)),
        "t > 0.9": band(0.9, 1),
        "t > 0.99": band(0.99, 1),
    }
    ratios = " | ".join(f"AP, damping {damping:g}" for damping in DAMPINGS)
    lines = [
        f"| condition of the data | times | gradient descent | {ratios} | largest gain |",
        "|---|---|---" + "|---" * len(DAMPINGS) + "|---|",
    ]
    for condition in conditions:
        for name, t in laws.items():
            s, c = moments(np.geomspace(1, 1 / condition, dim), t)
            spreads = [s, *(rates(s, damping) for damping in DAMPINGS)]
            cells = " | ".join(f"{spread.max() / spread.min():,.3g}" for spread in spreads)
            lines.append(f"| {condition:,g} | {name} | {cells} | {np.abs(c / s).max():.3g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
