"""Which layer is preconditioned how: rules by name, defaults by size, and a reason for every
parameter that is left to the gradient preconditioner (GP) alone."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from flowdopr.linalg import is_sharded
from flowdopr.optim.dopr.conv_views import ChannelView, MeanChannelView, PatchView, TransposedView
from flowdopr.optim.dopr.processes import is_split_along
from flowdopr.optim.dopr.views import AttentionView, EmbeddingView, LayerView, LinearView
from flowdopr.patterns import finder

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Embedding, *CONVS, *TRANSPOSED)
JOINT_PROJECTION = "in_proj_weight"
PROJECTIONS = (JOINT_PROJECTION, "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Of `nn.MultiheadAttention`, which has the first one or the other three."""
CUT_MODES = ("full", "blocks", "diagonal")
CONV_MODES = ("auto", *CUT_MODES, "sua", "sua-mean")
MODES = {
    "a Linear": ("auto", *CUT_MODES),
    "an Embedding": ("auto", "diagonal"),
    "an attention": ("auto", *CUT_MODES),
    "a transposed convolution": ("auto", *CUT_MODES),
    "a convolution": CONV_MODES,
}
# Reasons that a user of DoPr may not expect.
UNCALLED = "nn.MultiheadAttention applies it without calling its layer; use nn.Linear layers"
PARAMETRIZED = "parametrized, so that its gradient is not that of the weight in use"
LEFT_BY_MODEL = "its module has left_to_gp = True"
WIDEST_PATCH = 128  # a convolution with a wider patch takes "sua-mean" under "auto"
NARROWEST_BLOCK = 64  # "auto" cuts no layer into narrower blocks
logger = logging.getLogger("flowdopr.optim")


@dataclass(frozen=True)
class LayerRule:
    """How to precondition the layers whose module names a regular expression finds.

    Args:
        pattern: searched in the name of the module, without look-around; the empty one matches
            every layer.
        mode: "auto" (by the layer's kind and size), "none" (GP alone), "full", "blocks" (equal, at
            most `max_side` wide), "diagonal"; for convolutions also "sua" (one channel Sigma for
            all offsets of the kernel) and "sua-mean" (the same with the mean's cross terms).
        max_side: side of the widest Sigma that "auto" and "blocks" may use. None: as DoPr's.
        max_rows: rows of z that a forward contributes, or "all". None: as DoPr's.

    Raises:
        ValueError: a pattern that is no regular expression, or a value out of range.
    """

    pattern: str
    mode: str = "auto"
    max_side: int | None = None
    max_rows: int | str | None = None

    def __post_init__(self) -> None:
        known = ("none", *CONV_MODES)
        if self.mode not in known:
            self._refuse(f"mode is {self.mode!r}, it must be one of {', '.join(known)}")
        try:
            finder(self.pattern)
        except ValueError as error:
            self._refuse(f"{error}; correct it")
        if self.max_side is not None:
            if not is_count(self.max_side):
                self._refuse(f"max_side is {self.max_side}, it must be a whole number of 1 or more")
            if self.mode in ("none", "full", "diagonal"):
                self._refuse(f"max_side has no effect with mode {self.mode!r}; leave it out")
        if self.max_rows is not None:
            if not is_row_limit(self.max_rows):
                self._refuse(f"max_rows is {self.max_rows}, it must be 1 or more, or 'all'")
            if self.mode == "none":
                self._refuse("max_rows has no effect with mode 'none'; leave it out")

    def _refuse(self, reason: str) -> None:
        raise ValueError(f"layer rule {self.pattern!r}: {reason}")

    @classmethod
    def of(cls, rule: "LayerRule | Mapping[str, Any]") -> "LayerRule":
        """`rule` itself, or the rule whose fields a mapping gives."""
        if isinstance(rule, LayerRule):
            return rule
        known = [item.name for item in fields(cls)]
        wrong = [key for key in rule if key not in known]
        if wrong or "pattern" not in rule:
            what = f"has no field {wrong[0]!r}" if wrong else "needs a pattern"
            raise ValueError(f"a layer rule {what}: its fields are {', '.join(known)}")
        return cls(**rule)


def is_count(value: object) -> bool:
    """Whether `value` is a whole number of 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: object) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_row_limit(value: object) -> bool:
    """Whether `value` is a possible `max_rows`."""
    return value == "all" or is_count(value)


def row_limit(max_rows: int | str) -> int | None:
    """`max_rows` as a number, None for "all"."""
    return None if max_rows == "all" else int(max_rows)


@dataclass(frozen=True)
class Defaults:
    """DoPr's settings for layers, and for fields of rules, that no rule sets."""

    conv_mode: str
    max_side: int
    max_rows: int | None
    effective: bool

    def rule(self, module: nn.Module) -> LayerRule:
        """The rule of a layer that no rule matches."""
        return LayerRule("", self.conv_mode if isinstance(module, CONVS) else "auto")


@dataclass
class Layer:
    """One preconditioned weight.

    modules: the modules that use the weight, each with its view: several where it is tied.
    effective: whether AP multiplies the gradient of the layer's effective weight.
    reads: whose inputs count, for the table of roles.
    """

    name: str
    weight: nn.Parameter
    rule: LayerRule
    view: LayerView
    modules: list[tuple[nn.Module, LayerView]]
    effective: bool
    reads: str = "layer input"


@dataclass
class FoundLayers:
    """layers: those to precondition. roles: (name, shape, AP mode or "none", reason) of every
    parameter. frozen: layers that would be preconditioned if their weight were trained."""

    layers: list[Layer]
    roles: list[tuple[str, tuple[int, ...], str, str]]
    frozen: list[Layer]


def find_layers(
    model: nn.Module, optimized: set[int], rules: Sequence[LayerRule], defaults: Defaults
) -> FoundLayers:
    """The layers of `model` whose optimizer holds the parameters with the ids `optimized`.

    Raises:
        ValueError: a rule that decides nothing, a trainable layer weight that the optimizer lacks,
            a mode that a layer does not have, or a model without a layer to precondition. Other
            parameters that the optimizer lacks, which another optimizer may have, are logged.
    """
    found, reasons = _walk(model, rules, defaults)
    layers = [layer for layer in found if layer.weight.requires_grad]
    for layer in layers:
        if id(layer.weight) not in optimized:
            raise ValueError(
                f"the weight of layer {layer.name!r} is trainable but not in the optimizer: add it "
                "to a parameter group or set requires_grad_(False)"
            )
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no trainable layer to precondition (Linear, Conv, "
            "ConvTranspose, Embedding, MultiheadAttention, not ruled out): use the optimizer "
            "without DoPr"
        )
    frozen = [layer for layer in found if not layer.weight.requires_grad]
    return FoundLayers(layers, _roles(model, layers, reasons, optimized), frozen)


def _roles(
    model: nn.Module, layers: Sequence[Layer], reasons: dict[int, str], optimized: set[int]
) -> list[tuple[str, tuple[int, ...], str, str]]:
    modes = {id(layer.weight): (layer.view.describe(), layer.reads) for layer in layers}
    roles, missing = [], []
    for name, parameter in model.named_parameters():
        other = "not the weight of a layer" if parameter.requires_grad else "frozen"
        without = "none", reasons.get(id(parameter), other)
        mode, reason = modes.get(id(parameter), without)
        roles.append((name, tuple(parameter.shape), mode, reason))
        if parameter.requires_grad and id(parameter) not in optimized:
            missing.append(name)
    if missing:
        logger.warning(
            "%d trainable parameters, %s first, are not in the optimizer: it does not move them",
            len(missing),
            missing[0],
        )
    return roles


def _walk(
    model: nn.Module, rules: Sequence[LayerRule], defaults: Defaults
) -> tuple[list[Layer], dict[int, str]]:
    """All layers with a view, and the reasons why other weights have none, by the weight's id."""
    layers: dict[int, Layer] = {}
    reasons, used = _unusual(model, rules)
    for name, module, leaf, weight in _weights(model):
        if id(weight) in reasons:
            continue
        known = layers.get(id(weight))
        if known is not None:
            rule = known.rule
        else:
            number = _first_match(rules, name)
            if number is None and getattr(module, "left_to_gp", False):
                reasons[id(weight)] = LEFT_BY_MODEL
                continue
            rule = defaults.rule(module) if number is None else rules[number]
            used.add(number)
        view = _why_not(name, weight) or make_view(module, rule, defaults, leaf)
        if isinstance(view, LayerView) and not _can_be_sharded_as_it_is(view, weight):
            view = "sharded along the coordinates of z, where AP would need a gather"
        if isinstance(view, str):
            reasons[id(weight)] = view
            layers.pop(id(weight), None)
            continue
        effective = defaults.effective and "weight_map" in module._modules
        layer = Layer(name, weight, rule, view, [(module, view)], effective)
        layer.reads += ", for the gradient of the effective weight" if effective else ""
        if known is None:
            layers[id(weight)] = layer
        elif view.kind == known.view.kind:
            known.modules.append((module, view))
        else:
            _tie(layers, reasons, known, layer)
    for number, rule in enumerate(rules):
        if number not in used:
            raise ValueError(
                f"layer rule {rule.pattern!r} decides no layer: it matches no name of a layer with "
                "a weight, or an earlier rule takes them all; correct or remove it"
            )
    return list(layers.values()), reasons


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(name of a layer, its module, name of the parameter in it, the parameter)."""
    for name, module in model.named_modules():
        inside = isinstance(module, nn.MultiheadAttention)
        leaves = PROJECTIONS if inside else ("weight",) if isinstance(module, LAYERS) else ()
        for leaf in leaves:
            weight = module._parameters.get(leaf)
            if weight is not None:
                projection = f"{name}.{leaf.removesuffix('_weight')}".lstrip(".")
                yield projection if inside else name, module, leaf, weight


def _first_match(rules: Sequence[LayerRule], name: str) -> int | None:
    """The number of the rule that decides on a layer of this name."""
    return next((i for i, rule in enumerate(rules) if finder(rule.pattern)(name)), None)


def _unusual(
    model: nn.Module, rules: Sequence[LayerRule]
) -> tuple[dict[int, str], set[int | None]]:
    """The reasons why weights of layers that are not called, or not used as they are, have no view,
    and the numbers of the rules that match them. One warning names those without a rule."""
    reasons, names = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            reasons[id(module.out_proj.weight)] = UNCALLED
            names.append(f"{name}.out_proj".lstrip("."))
        if isinstance(module, LAYERS) and parametrize.is_parametrized(module, "weight"):
            originals = module.parametrizations["weight"].parameters()  # pyright: ignore
            reasons |= dict.fromkeys(map(id, originals), PARAMETRIZED)
            names.append(name)
    numbers = [_first_match(rules, name) for name in names]
    left = [name for name, number in zip(names, numbers, strict=True) if number is None]
    if left:
        logger.warning(
            "DoPr leaves the weight of layer %r%s to the optimizer alone; roles() has the reasons, "
            "and a rule of mode 'none' silences this",
            left[0],
            f" and of {len(left) - 1} more" if len(left) > 1 else "",
        )
    return reasons, set(numbers)


def _tie(layers: dict[int, Layer], reasons: dict[int, str], one: Layer, other: Layer) -> None:
    """Decide on a weight that two layers read in different orientations. Of an embedding and a
    linear head, the head's input counts: the axis that both share are its coordinates."""
    key, both = id(one.weight), (one, other)
    heads = [layer for layer in both if isinstance(layer.view, LinearView)]
    if len(heads) == 1 and any(isinstance(layer.view, EmbeddingView) for layer in both):
        layers[key] = heads[0]
        heads[0].reads = f"input of {heads[0].name}, with which an embedding is tied"
    else:
        reasons[key] = "tied between layers that read it in different orientations"
        layers.pop(key, None)


def _why_not(name: str, weight: nn.Parameter) -> str | None:
    """Why no view can be made of this weight, whatever its layer; None if one can."""
    if isinstance(weight, nn.UninitializedParameter):
        raise ValueError(f"layer {name!r} has no weight yet: run a forward, then build DoPr")
    if weight.is_complex() or not weight.numel():
        return "complex" if weight.is_complex() else "empty"
    if weight.dim() < 2:
        return "flattened, as FSDP1 does; use FSDP2's fully_shard"
    return None


def _can_be_sharded_as_it_is(view: LayerView, weight: nn.Parameter) -> bool:
    """Whether each process can precondition its part of the weight alone; True if it has all."""
    alone = view.free_axis is not None and view.groups == 1
    return not is_sharded(weight) or (alone and is_split_along(weight, view.free_axis))


def make_view(module: nn.Module, rule: LayerRule, defaults: Defaults, leaf: str) -> LayerView | str:
    """The view of a layer under a rule, or the reason why it is left to the GP alone. `leaf` is the
    name of the weight in the module.

    Raises:
        ValueError: a mode that this kind of layer does not have.
    """
    if rule.mode == "none":
        return f"rule {rule.pattern!r}"
    if isinstance(module, nn.Linear):
        _check_mode(rule, "a Linear")
        side = _widest_side(rule, defaults, module.in_features, module.out_features)
        blocks = _number_of_blocks(rule, module.in_features, side)
        return LinearView(_cut_mode(rule, blocks), 1, module.in_features, blocks)
    if isinstance(module, nn.MultiheadAttention):
        _check_mode(rule, "an attention")
        of = (0, 1, 2) if leaf == JOINT_PROJECTION else (PROJECTIONS.index(leaf) - 1,)
        dim = module._parameters[leaf].shape[1]  # pyright: ignore[reportOptionalMemberAccess]
        side = _widest_side(rule, defaults, dim, module.embed_dim)
        blocks = _number_of_blocks(rule, dim, side)
        return AttentionView(_cut_mode(rule, blocks), dim, blocks, of)
    if isinstance(module, nn.Embedding):
        _check_mode(rule, "an Embedding")
        return "sparse gradients" if module.sparse else EmbeddingView(module.num_embeddings)
    if isinstance(module, TRANSPOSED):
        _check_mode(rule, "a transposed convolution")
        side = _widest_side(rule, defaults, module.in_channels, module.out_channels)
        blocks = _number_of_blocks(rule, module.in_channels // module.groups, side)
        return TransposedView(module, _cut_mode(rule, blocks), blocks)
    assert isinstance(module, CONVS)
    return _conv_view(module, rule, defaults)


def _conv_view(conv: _ConvNd, rule: LayerRule, defaults: Defaults) -> LayerView:
    _check_mode(rule, "a convolution")
    channels = conv.in_channels // conv.groups
    patch = channels * math.prod(conv.kernel_size)
    side = _widest_side(rule, defaults, conv.in_channels, conv.out_channels)
    if rule.mode == "sua":
        return ChannelView(conv, "sua", fewest_blocks(channels, side))
    if rule.mode == "sua-mean" or (rule.mode == "auto" and patch > WIDEST_PATCH):
        return MeanChannelView(conv, fewest_blocks(channels, side))
    blocks = _number_of_blocks(rule, patch, rule.max_side or defaults.max_side)
    return PatchView(conv, _cut_mode(rule, blocks), blocks)


def _widest_side(rule: LayerRule, defaults: Defaults, d_in: int, d_out: int) -> int:
    """The side of the widest block. "auto" cuts a layer that narrows to half or less, such as an
    MLP's second one, into blocks as wide as its output; an output head with few channels stays
    whole, since it costs little."""
    side = rule.max_side or defaults.max_side
    narrows = rule.mode == "auto" and rule.max_side is None
    narrows = narrows and NARROWEST_BLOCK <= d_out <= d_in // 2
    return min(side, d_out) if narrows else side


def _number_of_blocks(rule: LayerRule, dim: int, side: int) -> int:
    if rule.mode == "full":
        return 1
    return dim if rule.mode == "diagonal" else fewest_blocks(dim, side)


def fewest_blocks(dim: int, max_side: int) -> int:
    """The smallest number of equal blocks of `dim` coordinates whose sides are at most `max_side`.

    Where that gives sides below a quarter of `max_side`, as for a prime `dim`, sides may be up to
    four times `max_side`.
    """
    divisors = [n for n in range(1, dim + 1) if dim % n == 0]
    fewest = next(n for n in divisors if dim // n <= max_side)
    if dim // fewest < max_side / 4:
        return next(n for n in divisors if dim // n <= 4 * max_side)
    return fewest


def _cut_mode(rule: LayerRule, blocks: int) -> str:
    if rule.mode == "diagonal":
        return "diagonal"
    return "blocks" if blocks > 1 else "full"


def _check_mode(rule: LayerRule, kind: str) -> None:
    if rule.mode not in MODES[kind]:
        raise ValueError(
            f"layer rule {rule.pattern!r}: mode {rule.mode!r} is not one {kind} has, which are "
            f"none, {', '.join(MODES[kind])}"
        )
