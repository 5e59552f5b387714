"""Settings of the optimizers: each section's fields are the optimizer's keyword arguments.

The docstring of the optimizer's class explains its settings, and docs/settings.md quotes it.
Defaults are those of the classes, but for DoPr's damping, which depends on `train.steps`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from flowdopr.config.types import (
    NAMED,
    Count,
    Fraction,
    NotNegative,
    Pattern,
    Positive,
    Section,
    text,
)


def _steps_or_share(value: float) -> int | float:
    """A share as a float and a number of steps as an int, whichever way YAML wrote them."""
    if 0 < value <= 1:
        return float(value)
    if value < 2 or value != int(value):
        raise ValueError(
            "must be a share of train.steps, above 0 and at most 1, or a number of steps, 2 or more"
        )
    return int(value)


StepsOrShare = Annotated[int | Positive, AfterValidator(_steps_or_share)]
Betas = tuple[Fraction, Fraction]
ALL = Literal["all"]
PACKAGES = ("torch.optim", "schedulefree", "prodigyopt", "pytorch_optimizer", "heavyball")
"""The packages whose classes `optimizer.class_path` may name. A config may be a stranger's, and
importing a package runs its code."""
ClassPath = Annotated[
    str,
    text(
        rf"({'|'.join(map(re.escape, PACKAGES))})(\.[A-Za-z]\w*)+",
        f"must be PACKAGE.CLASS with one of the packages {', '.join(PACKAGES)}",
    ),
]


class RuleConfig(Section):
    pattern: Pattern
    """Regular expression, without look-around, searched in a layer's name; the first rule that
    matches wins."""
    mode: Literal["auto", "none", "full", "blocks", "diagonal", "sua", "sua-mean"] = "auto"
    """Form of the layer's second moment; docs/layers.md says when to use which."""
    max_side: Count | None = None
    """Widest full matrix of `auto` and `blocks`. null: as `optimizer.dopr.max_side`."""
    max_rows: Count | ALL | None = None
    """Input rows a forward contributes. null: as `optimizer.dopr.max_rows`."""


class DoPrConfig(Section):
    damping: NotNegative | tuple[Positive, Positive, StepsOrShare] = (100.0, 1.0, 0.5)
    """Gamma, relative to the mean eigenvalue of Sigma; or [first, last, steps], which goes
    geometrically from first to last. Up to 1, `steps` is a share of `train.steps`. The larger the
    damping is, the less AP there is."""
    cov_decay: Fraction = 0.95
    refresh_every: Count = 16
    form: Literal["inverse", "sandwich"] = "inverse"
    power: Positive = 1.0
    max_rows: Count | ALL = 2048
    max_side: Count = 1280
    conv_mode: Literal["auto", "full", "sua", "sua-mean"] = "auto"
    pc_gradient: Literal["raw", "effective"] = "raw"
    rules: tuple[RuleConfig, ...] = ()


class OptimizerSection(Section):
    """Settings of every optimizer."""

    name: str
    lr: Positive = 1e-4
    """Peak learning rate, after warm-up."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay (sgd: added to the gradient), on matrices and convolutions only."""


class WithDoPr(OptimizerSection):
    """An optimizer that activation preconditioning can be put before."""

    dopr: DoPrConfig | None = None
    """Activation preconditioning (AP) before this optimizer: its settings, `{}` for its defaults.
    null: none. `optimizer.name=dopr-muon` is short for `muon` with `dopr: {}`."""


class WithAdamW(OptimizerSection):
    """An optimizer of matrices and convolutions, which leaves the other parameters to AdamW."""

    betas: Betas = (0.9, 0.95)
    eps: Positive = 1e-8
    adamw_lr: Positive | None = None
    adamw_for: tuple[Pattern, ...] = ()


class SGDConfig(WithDoPr):
    name: Literal["sgd"]
    momentum: Fraction = 0.0
    nesterov: bool = False


class AdamWConfig(WithDoPr):
    name: Literal["adamw"]
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-8


class SignumConfig(WithDoPr):
    name: Literal["signum"]
    momentum: Fraction = 0.9


class SOAPConfig(WithDoPr):
    name: Literal["soap"]
    betas: Betas = (0.95, 0.95)
    eps: Positive = 1e-8
    precondition_frequency: Count = 10


class RowNormConfig(WithAdamW, WithDoPr):
    name: Literal["rownorm"]
    momentum: Fraction = 0.95


class AdaMuonConfig(WithAdamW, WithDoPr):
    name: Literal["adamuon"]
    momentum: Fraction = 0.95
    nesterov: bool = True
    ns_steps: Count = 5
    ns_dtype: Literal["float32", "bfloat16"] | None = None


class MuonConfig(WithAdamW, WithDoPr):
    name: Literal["muon"]
    momentum: Fraction = 0.95
    nesterov: bool = True
    adjust_lr: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    ns_steps: Count = 5
    ns_dtype: Literal["float32", "bfloat16"] | None = None


class OutsideConfig(WithDoPr):
    name: Literal["outside"]
    class_path: ClassPath
    options: dict[str, Any] | None = None


class KFACConfig(WithAdamW):
    name: Literal["kfac"]
    momentum: Fraction = 0.9
    damping: Positive = 0.1
    cov_decay: Fraction = 0.95
    refresh_every: Count = 16


# fmt: off
OptimizerConfig = Annotated[
    SGDConfig | AdamWConfig | MuonConfig | SignumConfig
    | AdaMuonConfig | RowNormConfig | SOAPConfig | KFACConfig | OutsideConfig,
    NAMED,
]
# fmt: on
