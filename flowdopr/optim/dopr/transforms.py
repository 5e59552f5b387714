"""T of every layer: made from the averages at a refresh, applied to the gradients at every step."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flowdopr.linalg import laid_out_like, like_shard, local
from flowdopr.optim.dopr.inverse import Form, invert
from flowdopr.optim.dopr.layers import Layer
from flowdopr.optim.dopr.processes import exchanged, own_share, world_size
from flowdopr.optim.dopr.statistics import SecondMoment, Statistics

MAX_INVERTED = 2**22  # elements inverted in one call, which takes some four times their memory
MAX_MULTIPLIED = 2**18  # weights in one product: as many as a core's cache may hold


def make_transforms(statistics: Statistics, form: Form, *, share_work: bool) -> list[Tensor | None]:
    """T of every layer of `statistics`, in its order; None where there is no average yet.

    T of a layer whose refreshes were all skipped is the identity. Layers whose factorisation fails
    get a higher damping from the next refresh on.

    Args:
        share_work: whether each rank makes its share and gets the others' from them; else each
            makes all.
    """
    known, numbers = statistics.known(), statistics.numbers
    if not known:
        return [None] * len(statistics.moments)
    some = numbers.ema_weight > 0
    weights = torch.where(some, numbers.ema_weight, 1.0).unbind()
    gammas = numbers.damping.unbind()
    moments = [statistics.moments[i] for i in known]
    shares_work = share_work and world_size() > 1
    sides = [moment.view.shape[-1] for moment in moments]
    mine = own_share(sides) if shares_work else range(len(moments))
    made: list[Tensor | None] = [None] * len(moments)
    failed: list[Tensor | None] = [None] * len(moments)
    for chunk in _chunks(list(mine), [math.prod(moment.view.shape) for moment in moments]):
        averages = [_average(moments[i], weights[known[i]]) for i in chunk]
        stacks = [moments[i].view.stack(a) for i, a in zip(chunk, averages, strict=True)]
        scales = [moments[i].view.mean_eigenvalue(s) for i, s in zip(chunk, stacks, strict=True)]
        found = invert(stacks, scales, [gammas[known[i]] for i in chunk], form)
        for i, transform, bad in zip(chunk, *found, strict=True):
            made[i], failed[i] = transform, bad
    if shares_work:
        zeros = [moment.zeros(moment.view.transform_shape) for moment in moments]
        made, failed = exchanged(made, failed, zeros)  # pyright: ignore[reportAssignmentType]
    every: list[Tensor | None] = [None] * len(statistics.moments)
    flags = list(torch.zeros_like(some))
    for i, transform, bad in zip(known, made, failed, strict=True):
        assert bad is not None
        every[i], flags[i] = transform, bad.to(some.device)
    statistics.raise_damping(torch.stack(flags))
    return every


def _average(moment: SecondMoment, weight: Tensor) -> Tensor:
    assert moment.sigma is not None
    return moment.sigma / weight.to(moment.sigma)


def _chunks(numbers: list[int], sizes: list[int]) -> Iterator[list[int]]:
    """`numbers` in order of their sizes, cut so that each chunk stays near MAX_INVERTED."""
    chunk: list[int] = []
    for number in sorted(numbers, key=lambda i: (sizes[i], i)):
        if chunk and sum(sizes[i] for i in chunk) + sizes[number] > MAX_INVERTED:
            yield chunk
            chunk = []
        chunk.append(number)
    if chunk:
        yield chunk


def identity_transform(moment: SecondMoment) -> Tensor:
    """A T that changes nothing."""
    *stack, side, _ = moment.view.transform_shape
    eye = torch.eye(side, dtype=moment.dtype, device=moment.device)
    return eye.expand(*stack, side, side)


def apply(ready: Sequence[tuple[Layer, Tensor]]) -> None:
    """Replace the gradient of each layer by its product with its T."""
    for batch in _batches(ready):
        view, transforms = batch[0][0].view, [transform for _, transform in batch]
        products = view.multiply_many([_gradient(layer) for layer, _ in batch], transforms)
        for (layer, _), product in zip(batch, products, strict=True):
            weight = layer.weight
            assert weight.grad is not None
            weight.grad = like_shard(laid_out_like(product, local(weight)), weight.grad)  # frees G


def _gradient(layer: Layer) -> Tensor:
    assert layer.weight.grad is not None
    return local(layer.weight.grad)


def _batches(ready: Sequence[tuple[Layer, Tensor]]) -> Iterator[Sequence[tuple[Layer, Tensor]]]:
    """What to multiply together, with few weights in each batch."""
    alike: dict[tuple[object, ...], list[tuple[Layer, Tensor]]] = {}
    for number, (layer, transform) in enumerate(ready):
        key = layer.view.batch_key(_gradient(layer)) or (number,)
        alike.setdefault(key, []).append((layer, transform))
    for pairs in alike.values():
        size = max(1, MAX_MULTIPLIED // pairs[0][0].weight.numel())
        yield from (pairs[i : i + size] for i in range(0, len(pairs), size))


def step_sandwich(optimizer: torch.optim.Optimizer, ready: Sequence[tuple[Layer, Tensor]]) -> None:
    """W <- (1 - lr wd) W - lr GP(G L^-T) L^-1, after `apply` has made G L^-T.

    The GP steps from W = 0, where its weight decay does nothing. W then holds the GP's direction
    times -lr, exactly.
    """
    held = [layer.weight.clone() for layer, _ in ready]
    for layer, _ in ready:
        layer.weight.zero_()
    try:
        optimizer.step()
    except BaseException:
        for (layer, _), before in zip(ready, held, strict=True):
            layer.weight.copy_(before)
        raise
    kept = {
        id(p): 1 - group["lr"] * group.get("weight_decay", 0.0)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for (layer, transform), before in zip(ready, held, strict=True):
        move = layer.view.multiply(local(layer.weight), transform.mT)
        layer.weight.copy_(before.mul_(kept[id(layer.weight)]))
        local(layer.weight).add_(move)
