"""Which layer is preconditioned how: rules, defaults, and one role for every parameter."""

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from flowdopr.optim.conv import (
    MeanOffsetsCase,
    OffsetCase,
    PatchCase,
    SharedOffsetsCase,
    TransposedCase,
)
from flowdopr.optim.dual import DualCase
from flowdopr.optim.layers import Case, EmbeddingCase, LinearBiasCase, LinearCase, number_of_blocks
from flowdopr.optim.world import has_whole_rows, is_sharded

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Embedding, *CONVS, *TRANSPOSED)
STACKED = ("full", "blocks", "diagonal")
CONV_MODES = ("auto", *STACKED, "offsets", "sua", "sua-mean")
NARROWEST = 64
logger = logging.getLogger("flowdopr.optim")


@dataclass(frozen=True)
class LayerRule:
    """How to precondition the layers whose module names a regular expression finds.

    pattern: searched in the name of the module; the empty one matches every layer.
    mode: "auto" (by the layer's kind and size), "none" (GP alone), "full", "blocks" (equal, of at
        most max_side), "diagonal", "dual" (the newest refresh's rows instead of Sigma, for layers
        with fewer rows than coordinates); for convolutions also "offsets", "sua" and "sua-mean".
    bias: give a Linear its bias as one more coordinate.
    max_side: side of the widest Sigma "auto" and "blocks" may use.
    max_rows: rows of z a forward contributes, or "all".
    For the last three None takes what DoPr was given.
    """

    pattern: str
    mode: str = "auto"
    bias: bool | None = None
    max_side: int | None = None
    max_rows: int | str | None = None


@dataclass(frozen=True)
class Defaults:
    """For layers and fields that no rule decides; see DoPr."""

    conv_mode: str
    bias: bool
    max_side: int
    max_patch: int

    def rule(self, module: nn.Module) -> LayerRule:
        """The rule of a layer that no rule matches."""
        mode = self.conv_mode if isinstance(module, CONVS) else "auto"
        strided = isinstance(module, CONVS) and any(step != 1 for step in module.stride)
        return LayerRule("", "full" if mode == "offsets" and strided else mode)


@dataclass
class Layer:
    """One preconditioned weight (and its bias, where that is a coordinate)."""

    name: str
    parameters: list[nn.Parameter]
    rule: LayerRule
    case: Case
    readers: list[tuple[nn.Module, Case]] = field(default_factory=list)


@dataclass
class Plan:
    """The layers to precondition, (name, shape, AP mode or "none", reason) per parameter, and the
    weights that would be preconditioned if they were not frozen."""

    layers: list[Layer]
    roles: list[tuple[str, tuple[int, ...], str, str]]
    frozen: list[Layer]


class _Planner:
    """One walk over the modules; `layers` and `refused` are keyed by the weight's identity."""

    def __init__(self, model: nn.Module, rules: Sequence[LayerRule], defaults: Defaults) -> None:
        self.defaults = defaults
        self.layers: dict[int, Layer] = {}
        self.refused: dict[int, str] = {}
        # A bias belongs to one layer: tied weights leave it to the GP.
        owners = Counter(id(m._parameters.get("weight")) for m in model.modules())
        self.tied = {key for key, count in owners.items() if count > 1}
        used: set[int] = set()
        for name, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                self._refuse_attention(module)
            weight = module._parameters.get("weight")
            if not isinstance(module, LAYERS) or weight is None or id(weight) in self.refused:
                continue
            number = next((i for i, r in enumerate(rules) if re.search(r.pattern, name)), None)
            if id(weight) not in self.layers:
                used.add(-1 if number is None else number)
            self._add(
                name, module, weight, rules[number] if number is not None else defaults.rule(module)
            )
        for number, rule in enumerate(rules):
            if number not in used:
                raise ValueError(
                    f"layer rule {rule.pattern!r} decides no layer: it matches no name of a layer "
                    "with a weight, or an earlier rule takes them all; correct or remove it"
                )

    def _add(self, name: str, module: nn.Module, weight: nn.Parameter, rule: LayerRule) -> None:
        if isinstance(weight, nn.UninitializedParameter):
            raise ValueError(f"layer {name!r} has no weight yet: run a forward, then build DoPr")
        if weight.is_complex():
            self._refuse(weight, "complex")
            return
        if weight.dim() < 2:
            self._refuse(weight, "flattened, as FSDP1 does; use FSDP2's fully_shard")
            return
        known = self.layers.get(id(weight))
        rule = known.rule if known else rule
        if id(weight) in self.tied or not _trains_bias(module):
            rule = replace(rule, bias=False)
        case = make_case(module, rule, self.defaults)
        if isinstance(case, str):
            self._refuse(weight, case)
        elif is_sharded(weight) and not (case.rows_first and has_whole_rows(weight)):
            self._refuse(weight, "sharded along the coordinates of z, where AP would need a gather")
        elif known is None:
            parameters = [weight]
            if case.takes_bias and isinstance(module, nn.Linear):
                parameters.append(module.bias)
            self.layers[id(weight)] = Layer(name, parameters, rule, case, [(module, case)])
        elif (case.kind, case.mode, case.shape) == (
            known.case.kind,
            known.case.mode,
            known.case.shape,
        ):
            known.readers.append((module, case))
        else:
            self._refuse(weight, "tied between layers that read it in different orientations")

    def _refuse(self, weight: nn.Parameter, reason: str) -> None:
        self.layers.pop(id(weight), None)
        self.refused[id(weight)] = reason

    def _refuse_attention(self, module: nn.MultiheadAttention) -> None:
        reason = "nn.MultiheadAttention bypasses module hooks; use separate nn.Linear layers"
        for parameter in module.parameters():
            if parameter.dim() > 1:
                self._refuse(parameter, reason)


def _trains_bias(module: nn.Module) -> bool:
    bias = module._parameters.get("bias")
    return bias is not None and bias.requires_grad


def make_plan(
    model: nn.Module, optimized: set[int], rules: Sequence[LayerRule], defaults: Defaults
) -> Plan:
    """The plan for `model` whose optimizer holds the parameters with the ids `optimized`.

    Raises ValueError for a rule that decides nothing, for a trainable layer weight that the
    optimizer lacks, and for a model without a layer to precondition. Other parameters that it
    lacks, which another optimizer may have, are logged.
    """
    planner = _Planner(model, rules, defaults)
    modes: dict[int, str] = {}
    layers, frozen = [], []
    for layer in planner.layers.values():
        if not layer.parameters[0].requires_grad:
            planner.refused[id(layer.parameters[0])] = "frozen"
            frozen.append(layer)
            continue
        for parameter in layer.parameters:
            if id(parameter) not in optimized:
                raise ValueError(
                    f"the {'weight' if parameter is layer.parameters[0] else 'bias'} of layer "
                    f"{layer.name!r} is trainable but not in the optimizer: add it to a parameter "
                    "group or set requires_grad_(False)"
                )
            modes[id(parameter)] = layer.case.describe()
        layers.append(layer)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no trainable layer to precondition (Linear, Conv, "
            "ConvTranspose, Embedding, not ruled out): use the optimizer without DoPr"
        )
    roles = []
    for name, parameter in model.named_parameters():
        mode = modes.get(id(parameter), "none")
        plain = "frozen" if not parameter.requires_grad else "not the weight of a layer"
        reason = "layer input" if mode != "none" else planner.refused.get(id(parameter), plain)
        roles.append((name, tuple(parameter.shape), mode, reason))
    idle = [
        name for name, p in model.named_parameters() if p.requires_grad and id(p) not in optimized
    ]
    if idle:
        logger.warning(
            "%d trainable parameters, %s first, are not in the optimizer: it does not move them",
            len(idle),
            idle[0],
        )
    return Plan(layers, roles, frozen)


def make_case(module: nn.Module, rule: LayerRule, defaults: Defaults) -> Case | str:
    """The case of a layer under a rule, or the reason why it is left to the GP alone.

    Raises ValueError for a mode that this kind of layer does not have.
    """
    if rule.mode == "none":
        return f"rule {rule.pattern!r}"
    if rule.mode == "dual" and not isinstance(module, nn.Embedding):
        return DualCase(_full_case(module, rule, defaults))
    if isinstance(module, nn.Linear):
        _check_mode(rule, "a Linear", ("auto", *STACKED, "dual"))
        side = _side(rule, defaults, module.in_features, module.out_features)
        blocks = _blocks(rule, module.in_features, side)
        bias = defaults.bias if rule.bias is None else rule.bias
        if bias and blocks == 1:
            return LinearBiasCase("full", 1, module.in_features + 1)
        return LinearCase(_stacked_mode(rule, blocks), 1, module.in_features, blocks)
    if isinstance(module, nn.Embedding):
        _check_mode(rule, "an Embedding", ("auto", "diagonal"))
        return "sparse gradients" if module.sparse else EmbeddingCase(module.num_embeddings)
    if isinstance(module, TRANSPOSED):
        _check_mode(rule, "a transposed convolution", ("auto", *STACKED, "dual"))
        side = _side(rule, defaults, module.in_channels, module.out_channels)
        blocks = _blocks(rule, module.in_channels // module.groups, side)
        return TransposedCase(module, _stacked_mode(rule, blocks), blocks)
    assert isinstance(module, CONVS)
    return _conv_case(module, rule, defaults)


def _full_case(module: nn.Module, rule: LayerRule, defaults: Defaults) -> Case:
    case = make_case(module, replace(rule, mode="full"), defaults)
    assert isinstance(case, Case)
    return case


def _conv_case(module: _ConvNd, rule: LayerRule, defaults: Defaults) -> Case:
    _check_mode(rule, "a convolution", (*CONV_MODES, "dual"))
    channels = module.in_channels // module.groups
    patch = channels * math.prod(module.kernel_size)
    side = _side(rule, defaults, module.in_channels, module.out_channels)
    if rule.mode == "offsets":
        return OffsetCase(module)
    if rule.mode == "sua":
        return SharedOffsetsCase(module, "sua", number_of_blocks(channels, side))
    if rule.mode == "sua-mean" or (rule.mode == "auto" and patch > defaults.max_patch):
        return MeanOffsetsCase(module, number_of_blocks(channels, side))
    blocks = _blocks(rule, patch, rule.max_side or defaults.max_side)
    return PatchCase(module, _stacked_mode(rule, blocks), blocks)


def _side(rule: LayerRule, defaults: Defaults, d_in: int, d_out: int) -> int:
    """The widest block. "auto" cuts what narrows to half and less, such as an MLP's second layer,
    into blocks of its output's width; heads with few outputs stay whole, they cost little."""
    side = rule.max_side or defaults.max_side
    narrows = rule.mode == "auto" and rule.max_side is None and NARROWEST <= d_out <= d_in // 2
    return min(side, d_out) if narrows else side


def _blocks(rule: LayerRule, dim: int, side: int) -> int:
    if rule.mode == "full":
        return 1
    return dim if rule.mode == "diagonal" else number_of_blocks(dim, side)


def _stacked_mode(rule: LayerRule, blocks: int) -> str:
    if rule.mode == "diagonal":
        return "diagonal"
    return "blocks" if blocks > 1 else "full"


def _check_mode(rule: LayerRule, kind: str, modes: tuple[str, ...]) -> None:
    if rule.mode not in modes:
        raise ValueError(
            f"layer rule {rule.pattern!r}: mode {rule.mode!r} is not one {kind} has, which are "
            f"none, {', '.join(modes)}"
        )
