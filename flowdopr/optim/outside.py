"""Optimizers of other packages, by the import path of their class."""

import difflib
import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from flowdopr.linalg import is_sharded
from flowdopr.optim.base import Float32Step
from flowdopr.optim.roles import parameter_groups

# torch.load reads these with weights_only=True, and tensors, in dicts, lists, tuples and sets.
PLAIN = (torch.dtype, bool, int, float, str, bytes, type(None))
INCOMPLETE = re.compile(r"heavyball\.(LATHER|PSGD\w*|QSGD)")  # whose state is, in version 3.2.1
# What torch says of too little memory; `flowdopr.exits` knows it too, but `optim` stands alone.
NO_MEMORY = re.compile(
    "(can't|Cannot) allocate memory|not enough memory|out of memory|ALLOC_FAILED"
)


class OutsideStep(Float32Step):
    """Holds another package's optimizer to what a training run relies on."""

    class_path: str
    _checked = False

    def _update_all(self) -> None:
        """A step that leaves the weights in their memory, which averages of them and DDP share.

        Raises:
            ValueError: it failed, or its state cannot be read from a checkpoint.
        """
        before = [(p, p.data) for p in self._parameters()]
        try:
            super()._update_all()
        except Exception as error:
            if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
                raise  # the options do not decide this
            raise _refusal(self.class_path, "a step of it fails", error) from error
        for p, data in before:
            if p.data_ptr() != data.data_ptr():
                p.data = data.copy_(p)
        if not self._checked:
            self._checked = True
            # heavyball's private entries of groups are not saved.
            settings = [v for g in self.param_groups for k, v in g.items() if not k.startswith("_")]
            if foreign := _foreign([*self.state.values(), *settings]):
                raise ValueError(
                    f"class_path {self.class_path}: its state holds a {foreign}, which cannot be "
                    "read from a checkpoint: choose another class"
                )

    # heavyball stores bytes and unpickles them on loading, and a checkpoint may be a stranger's.

    def state_dict(self) -> dict[str, Any]:
        """As the class has it, without bytes."""
        return _without_bytes(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the class has it, without bytes."""
        super().load_state_dict(_without_bytes(state_dict))


def _without_bytes(state: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in state.items() if not isinstance(value, bytes | bytearray)}
    return {k: _without_bytes(v) if isinstance(v, dict) else v for k, v in kept.items()}


def _foreign(value: Any) -> str:
    """The name of the first type in `value` that is not plain, "" if there is none."""
    if type(value) in (dict, list, tuple, set):
        parts = value.values() if isinstance(value, dict) else value
        return next((found for part in parts if (found := _foreign(part))), "")
    plain = isinstance(value, torch.Tensor) or type(value) in PLAIN
    return "" if plain else type(value).__name__


def outside(
    model: nn.Module,
    lr: float,
    *,
    class_path: str,
    weight_decay: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer class of torch or of another package, which updates every parameter.

    Args:
        class_path: import path of the class, such as `schedulefree.AdamWScheduleFree`. Importing
            its package runs that package's code.
        weight_decay: as the class applies it, on matrices and convolutions only.
        options: the class's further arguments, such as `{warmup_steps: 100}`.

    Raises:
        ValueError: the package is missing, it has no such class, the class does not take `lr`, an
            option or parameters alone, or it refuses a value or these parameters.
    """
    kind = _find(class_path)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in (options or {}).items()}
    _check_arguments(kind, class_path, weight_decay, given)
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            f"class_path {class_path}: takes whole weights, not FSDP's shards: use DDP, or 'muon'"
        )
    groups = parameter_groups(model, kind.__name__.lower(), weight_decay=weight_decay)
    made: Any = type(kind.__name__, (OutsideStep, kind), {"class_path": class_path})
    try:
        optimizer = made(groups, lr=lr, **given)
    except Exception as error:
        raise _refusal(class_path, "it refuses its options or this model", error) from error
    if averages_itself(optimizer):
        optimizer.train()
    return optimizer


def averages_itself(optimizer: Any) -> bool:
    """Whether `optimizer`, or the one that a DoPr wraps, averages the weights: it has `eval()`,
    which puts its average into the model, and `train()`, which puts the trained weights there."""
    return hasattr(getattr(optimizer, "optimizer", optimizer), "eval")


def _find(class_path: str) -> Any:
    """The class at `class_path`. Only the package is imported, which is the first word."""
    if INCOMPLETE.fullmatch(class_path):
        raise ValueError(
            f"class_path {class_path}: it does not save all that its steps depend on, so a resumed "
            "run would differ: choose another class, such as pytorch_optimizer.Kron"
        )
    package, _, inside = class_path.partition(".")
    try:
        held_by = import_module(package)
    except ImportError as error:
        raise ValueError(
            f"class_path {class_path}: the package {package} cannot be imported ({error}): "
            f"pip install {package}"
        ) from error
    if package == "heavyball":  # compiled, it chooses kernels by timing: a resumed run would differ
        held_by.utils.compile_mode = None
    *folders, name = inside.split(".")
    for folder in folders:
        held_by = getattr(held_by, folder, None)
    found = getattr(held_by, name, None)
    if not _is_optimizer(found):
        values = getattr(held_by, "__dict__", {}).items()
        known = [key for key, value in values if _is_optimizer(value)]
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean '{near[0]}'?" if near else "give a subclass of torch's Optimizer"
        raise ValueError(f"class_path {class_path}: this is no optimizer class; {remedy}")
    return found


def _is_optimizer(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer)


def _check_arguments(
    kind: type, class_path: str, weight_decay: float, options: Mapping[str, Any]
) -> None:
    """Check that the class takes parameters, a learning rate and `options`, and needs no more."""
    first, *rest = inspect.signature(kind).parameters.values()
    named = {p.name: p for p in rest if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    known = sorted(named.keys() - {"lr", "weight_decay"})
    if first.name != "params" or "lr" not in named:
        what = "no learning rate lr" if first.name == "params" else f"'{first.name}' and not params"
        raise ValueError(f"class_path {class_path}: the class takes {what}: choose another one")
    for key in options:
        if key in ("params", "lr", "weight_decay"):
            raise ValueError(f"options.{key}: comes from elsewhere; remove it, or set {key} itself")
        if key not in known:
            remedy = f"it has {', '.join(known)}"
            raise ValueError(f"options.{key}: {class_path} has no such argument; {remedy}")
    for key, parameter in named.items():
        if parameter.default is parameter.empty and key not in ("lr", "weight_decay", *options):
            raise ValueError(
                f"class_path {class_path}: the class needs '{key}': give it in options if it is a "
                "plain value, else choose another class"
            )
    if weight_decay and "weight_decay" not in named:
        raise ValueError(f"weight_decay {weight_decay}: {class_path} has none; set it to 0")


def _refusal(class_path: str, what: str, error: Exception) -> ValueError:
    said = " ".join(str(error).split())
    return ValueError(
        f"class_path {class_path}: {what}: {type(error).__name__}: {said}; "
        "correct options, or choose another class"
    )
