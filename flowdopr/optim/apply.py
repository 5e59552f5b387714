"""M in place of G: the part of DoPr that runs every step."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flowdopr.optim.plan import Layer
from flowdopr.optim.world import like_shard, local

MAX_TOGETHER = 2**18  # weights in one product: as many as a core's cache may hold


def apply(ready: Sequence[tuple[Layer, Tensor]]) -> None:
    """Replace the gradients of each layer by their product with its T."""
    for part in _batches([layer for layer, _ in ready]):
        layers = [ready[i][0] for i in part]
        grads = [_gradients(layer) for layer in layers]
        many = layers[0].case.multiply_many(grads, [ready[i][1] for i in part])
        for layer, products in zip(layers, many, strict=True):
            for parameter, product in zip(layer.parameters, products, strict=True):
                assert parameter.grad is not None
                product = _laid_out(product, local(parameter))
                parameter.grad = like_shard(product, parameter.grad)  # frees G


def _gradients(layer: Layer) -> list[Tensor]:
    return [local(p.grad) for p in layer.parameters if p.grad is not None]


def _batches(layers: Sequence[Layer]) -> Iterator[list[int]]:
    """Numbers of the layers to precondition together, in few elements each."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for number, layer in enumerate(layers):
        alike.setdefault(layer.case.batch_key(_gradients(layer)) or (number,), []).append(number)
    for numbers in alike.values():
        size = max(1, MAX_TOGETHER // layers[numbers[0]].parameters[0].numel())
        yield from (numbers[i : i + size] for i in range(0, len(numbers), size))


def _laid_out(product: Tensor, parameter: Tensor) -> Tensor:
    """`product` with the strides of the parameter, as autograd would leave it: torch's fused
    optimizers read a gradient on the CPU as if it had them."""
    if product.stride() == parameter.stride():
        return product
    return torch.empty_like(parameter).copy_(product)
