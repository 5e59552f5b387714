"""Where the numbers of a batch stop being finite: the batch is run once more and watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flowdopr.linalg import local


def culprit(model: nn.Module, run: Callable[[], Tensor]) -> str:
    """What is first not finite while `run` goes forward and backward through `model`.

    That is the output of a layer, in the order in which layers end; else the loss, which `run`
    returns; else the gradient of a parameter. "" if all are finite. The host waits for each layer.
    """
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> Any:
        def look(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not found and not _finite(output):
                own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
                causes = {"weights": own, "inputs": inputs}
                broken = [what for what, values in causes.items() if not _finite(values)]
                why = f", nor are its {' and '.join(broken)}" if broken else ""
                found.append(f"the output of layer '{name}' is not finite{why}")

        return module.register_forward_hook(look)

    watched = [watch(name, module) for name, module in model.named_modules() if name]
    try:
        with torch.compiler.set_stance("force_eager"):
            loss = run()
    finally:
        for handle in watched:
            handle.remove()
    if not found and not _finite(loss):
        found.append(f"the loss is {float(loss)}, though the outputs of all layers are finite")
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found += [
        f"the gradient of '{name}' is not finite, though the loss is"
        for name, gradient in gradients.items()
        if not found and not _finite(gradient)
    ]
    return found[0] if found else ""


def _finite(values: Iterable[Any] | Tensor) -> bool:
    """Whether all numbers of the tensors in `values` are finite."""
    tensors = (local(value) for value in tree_leaves(values) if isinstance(value, Tensor))
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
