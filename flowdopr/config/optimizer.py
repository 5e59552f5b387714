"""Settings of the optimizers, passed on by name; an optimizer refuses those it does not use."""

from __future__ import annotations

from typing import Literal

from flowdopr.config.types import Count, CountOrZero, Fraction, NotNegative, Positive, Section

# fmt: off
OptimizerName = Literal[
    "sgd", "adamw", "muon", "signum", "adamuon", "rownorm", "soap", "kfac",
    "dopr-sgd", "dopr-adamw", "dopr-muon", "dopr-signum", "dopr-adamuon", "dopr-rownorm",
    "dopr-soap",
]
# fmt: on


class RuleConfig(Section):
    pattern: str
    """Regular expression searched in a layer's name; the first rule that matches wins."""
    mode: Literal[
        "auto", "none", "full", "blocks", "diagonal", "dual", "offsets", "sua", "sua-mean"
    ] = "auto"
    """Form of the layer's second moment; docs/optim.md says when to use which."""
    bias: bool | None = None
    """Take a Linear's bias as one more input coordinate. null: as `optimizer.bias`."""
    max_side: Count | None = None
    """Widest full matrix of `auto` and `blocks`. null: as `optimizer.max_side`."""
    max_rows: Count | Literal["all"] | None = None
    """Input rows a forward contributes. null: as `optimizer.max_rows`."""


class OptimizerConfig(Section):
    name: OptimizerName = "adamw"
    """Gradient preconditioner (GP); `dopr-` adds activation preconditioning (AP) before it."""
    lr: Positive = 1e-4
    """Peak learning rate, after warm-up."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay (sgd: added to the gradient), on matrices and convolutions only."""
    betas: tuple[Fraction, Fraction] | None = None
    """Adam's two decay rates (adamw, soap, and the AdamW part of muon, adamuon and kfac)."""
    eps: Positive | None = None
    """Adam's epsilon."""
    momentum: Fraction | None = None
    """Momentum (sgd, signum, muon, adamuon, kfac)."""
    nesterov: bool | None = None
    """Nesterov momentum (sgd, muon, adamuon)."""
    adjust_lr: Literal["original", "match_rms_adamw"] | None = None
    """Muon's scale by matrix shape: Keller Jordan's, or Moonshot's that matches AdamW's updates."""
    ns_steps: Count | None = None
    """Newton-Schulz iterations (muon, adamuon)."""
    ns_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of these iterations. null: bfloat16 on CUDA, the weights' own on the CPU."""
    adamw_lr: Positive | None = None
    """Learning rate of the AdamW part of muon, adamuon and kfac. null: `lr`."""
    adamw_for: tuple[str, ...] | None = None
    """Names (regular expressions) of matrices that muon, adamuon and kfac leave to AdamW."""
    split_heads: bool | None = None
    """Treat each head of attention's q, k and v as a matrix of its own (muon, adamuon)."""
    precondition_frequency: Count | None = None
    """SOAP: steps between renewals of its basis."""
    damping: NotNegative | tuple[Positive, Positive, Count] | None = None
    """DoPr and kfac: gamma, relative to the mean eigenvalue of a layer's input second moment; or
    [first, last, steps], which goes geometrically from first to last."""
    cov_decay: Fraction | None = None
    """DoPr and kfac: EMA decay of the second moment at each refresh; 0 uses the newest alone."""
    refresh_every: Count | None = None
    """DoPr and kfac: steps between refreshes of the statistics and their inverses."""
    form: Literal["inverse", "sandwich"] | None = None
    """DoPr: G S^-1 (the paper's), or the invariant GP(G L^-T) L^-1 with S = L L^T."""
    power: Positive | None = None
    """DoPr: alpha of G S^-alpha; 1 is the paper's."""
    anneal: tuple[CountOrZero, Count] | None = None
    """DoPr: [first, last] steps between which AP fades into the bare GP."""
    max_rows: Count | Literal["all"] | None = None
    """DoPr: rows of inputs one forward contributes to a layer's statistics, evenly spread."""
    max_side: Count | None = None
    """DoPr: side of the widest second moment; wider layers are treated in blocks."""
    max_patch: Count | None = None
    """DoPr: widest convolution patch with a full second moment; wider ones take `sua-mean`."""
    conv_mode: Literal["auto", "full", "offsets", "sua", "sua-mean"] | None = None
    """DoPr: second moment of convolutions that no rule decides."""
    bias: bool | None = None
    """DoPr: Linear biases as one more input coordinate, which centres the inputs."""
    unit_scale: bool | None = None
    """DoPr: divide the second moment by its mean eigenvalue before inverting it."""
    max_nonfinite: Count | None = None
    """DoPr: refreshes in a row with inputs that are not finite, after which training stops."""
    rules: tuple[RuleConfig, ...] | None = None
    """DoPr: what differs for layers chosen by name."""
