"""Which layer is preconditioned how: rules, defaults, and one role for every parameter."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from flowdopr.optim.conv import PatchCase
from flowdopr.optim.layers import Case, EmbeddingCase, LinearBiasCase, LinearCase, number_of_blocks

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, nn.Embedding, *CONVS)


@dataclass(frozen=True)
class LayerRule:
    """How to precondition the layers whose module name a regular expression matches in full.

    mode: "auto" (the default of the layer's kind and size), "none", "full", "blocks", "diagonal".
    bias: give a Linear its bias as one more coordinate.
    max_side: side of the widest Sigma "auto" and "blocks" may use; None takes DoPr's.
    max_rows: rows of z a forward contributes; None takes DoPr's.
    """

    pattern: str
    mode: str = "auto"
    bias: bool = False
    max_side: int | None = None
    max_rows: int | None = None


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
    """The layers to precondition, and (name, shape, AP mode or "none", reason) per parameter."""

    layers: list[Layer]
    roles: list[tuple[str, tuple[int, ...], str, str]]


class _Planner:
    """One walk over the modules; `layers` and `refused` are keyed by the weight's identity."""

    def __init__(self, model: nn.Module, rules: Sequence[LayerRule], max_side: int) -> None:
        self.rules, self.max_side = rules, max_side
        self.layers: dict[int, Layer] = {}
        self.refused: dict[int, str] = {}
        used: set[int] = set()
        for name, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                self._refuse_attention(module)
            weight = module._parameters.get("weight")
            if not isinstance(module, LAYERS) or weight is None or id(weight) in self.refused:
                continue
            number = next((i for i, r in enumerate(rules) if re.search(r.pattern, name)), None)
            used.add(-1 if number is None else number)
            self._add(name, module, weight, rules[number] if number is not None else LayerRule(""))
        for number, rule in enumerate(rules):
            if number not in used:
                raise ValueError(
                    f"layer rule {rule.pattern!r} decides no layer: it matches no name of a layer "
                    "with a weight, or an earlier rule takes them all; correct or remove it"
                )

    def _add(self, name: str, module: nn.Module, weight: nn.Parameter, rule: LayerRule) -> None:
        known = self.layers.get(id(weight))
        case = make_case(module, known.rule if known else rule, self.max_side)
        if isinstance(case, str):
            self._refuse(weight, case)
        elif known is None:
            parameters = [weight]
            if isinstance(case, LinearBiasCase) and isinstance(module, nn.Linear):
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


def make_plan(
    model: nn.Module, optimized: set[int], rules: Sequence[LayerRule], max_side: int
) -> Plan:
    """The plan for `model` whose optimizer holds the parameters with the ids `optimized`.

    Raises ValueError for a rule that decides nothing, for a trainable layer weight that the
    optimizer lacks, and for a model without a layer to precondition.
    """
    planner = _Planner(model, rules, max_side)
    modes: dict[int, str] = {}
    layers = []
    for layer in planner.layers.values():
        if not layer.parameters[0].requires_grad:
            planner.refused[id(layer.parameters[0])] = "frozen"
            continue
        for parameter in layer.parameters:
            if id(parameter) not in optimized:
                raise ValueError(
                    f"the weight of layer {layer.name!r} is trainable but not in the optimizer: "
                    "add it to a parameter group or set requires_grad_(False)"
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
    return Plan(layers, roles)


def make_case(module: nn.Module, rule: LayerRule, max_side: int) -> Case | str:
    """The case of a layer under a rule, or the reason why it is left to the GP alone."""
    if rule.mode == "none":
        return f"rule {rule.pattern!r}"
    side = rule.max_side or max_side
    if isinstance(module, nn.Linear):
        return _linear_case(module, rule, side)
    if isinstance(module, nn.Embedding):
        if module.sparse:
            return "sparse gradients"
        return EmbeddingCase(module.num_embeddings)
    assert isinstance(module, CONVS)
    blocks = number_of_blocks(PatchCase(module).side, side)
    return PatchCase(module, "blocks" if blocks > 1 else "full", blocks)


def _linear_case(module: nn.Linear, rule: LayerRule, side: int) -> Case:
    dim = module.in_features
    blocks = {"full": 1, "diagonal": dim}.get(rule.mode, number_of_blocks(dim, side))
    if rule.bias and module.bias is not None and blocks == 1:
        return LinearBiasCase("full", 1, dim + 1)
    mode = {1: "full", dim: "diagonal"}.get(blocks, "blocks") if dim > 1 else "full"
    return LinearCase(mode, 1, dim, blocks)
