"""Second moments of layer inputs: gathered by hooks, averaged over refreshes.

A window is everything between two optimizer steps, all micro-batches of one step. Sums and numbers
of rows are kept apart until the step, so micro-batches and processes pool exactly. A window keeps
two sums of each layer: of inputs that no backward has used yet, and of inputs that one has.
`zero_grad` without a step discards the used ones alone. So a step that a GradScaler skips leaves no
trace, whether `zero_grad` comes before the forward or between forward and backward.

The average of Sigma is an exponential moving average divided by the sum of its weights, which makes
it a weighted mean from the first refresh on (a "debiased EMA").
"""

import itertools
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowdopr.linalg import without_autocast
from flowdopr.optim.dopr.hooks import (
    InputHook,
    OutputGradientHook,
    is_recomputation,
    register,
    unregister,
)
from flowdopr.optim.dopr.inverse import smallest_pivot
from flowdopr.optim.dopr.processes import agreed, summed, world_size
from flowdopr.optim.dopr.reports import DeferredRead, Diagnostics
from flowdopr.optim.dopr.views import LayerView, Sample


@dataclass
class WindowSum:
    """A sum of z z^T, (g, b, s, s), with its number of rows; None and 0 before the first row."""

    total: Tensor | None = None
    rows: int = 0

    def move_into(self, other: "WindowSum") -> None:
        """Add everything to `other` and leave nothing here."""
        if self.total is not None:
            other.total = self.total if other.total is None else other.total.add_(self.total)
            other.rows += self.rows
        self.total, self.rows = None, 0


@dataclass(eq=False)
class SecondMoment:
    """Sigma of one layer.

    max_rows, rule: rows that a forward contributes, and the pattern of the layer's rule.
    free_of_scale: whether each window's second moment is divided by its mean eigenvalue before it
        is averaged, because its rows have a scale of their own: that of the loss.
    unused, used: what this window has gathered, before and after a backward.
    sigma: the exponential moving average of the windows' second moments, not yet divided by the sum
        of its weights, which `Statistics.numbers` has.
    shared_with: another layer that reads the same tensors, whose Sigma this layer uses instead of
        gathering its own.
    weights: those of all layers that use this Sigma.
    reads: numbers of the tensors that it read in this window.
    number: its place in `Statistics.moments`.
    """

    name: str
    view: LayerView
    weight: Tensor
    max_rows: int | None = None
    rule: str = ""
    free_of_scale: bool = False
    unused: WindowSum = field(default_factory=WindowSum)
    used: WindowSum = field(default_factory=WindowSum)
    sigma: Tensor | None = None
    shared_with: "SecondMoment | None" = None
    reads: list[int] = field(default_factory=list)
    number: int = -1

    def __post_init__(self) -> None:
        self.dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        self.weights = [self.weight]

    @property
    def device(self) -> torch.device:
        """Where the weight is now."""
        return self.weight.device

    def zeros(self, shape: Sequence[int]) -> Tensor:
        """A tensor of zeros of this layer's precision, on its device."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @property
    def trains(self) -> bool:
        """Whether a layer that uses this Sigma is trained now."""
        return any(weight.requires_grad for weight in self.weights)

    def share(self, owner: "SecondMoment") -> None:
        """Use the Sigma of `owner` from now on."""
        self.shared_with = owner
        owner.weights.append(self.weight)

    def gather(self, x: Tensor, view: LayerView, turn: int) -> None:
        """Add one forward's input, seen through the `view` of the module that was called."""
        window = self.unused
        if window.total is None:
            window.total = torch.zeros(self.view.shape, dtype=self.dtype, device=x.device)
        with without_autocast([x.device]):
            window.rows += view.accumulate(window.total, x, Sample(self.max_rows, turn))

    def close_window(self) -> WindowSum:
        """End the window; returns all that it gathered."""
        self.unused.move_into(self.used)
        whole, self.used = self.used, WindowSum()
        self.reads = []
        return whole if whole.rows else WindowSum()  # empty batches count as no forward


def on_device(numbers: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor (n,) of numbers from the host. It is filled on the device, since a copy would make
    the host wait."""
    return torch.stack([torch.full((), float(n), device=device, dtype=dtype) for n in numbers])


class Statistics:
    """The second moments of all layers, their hooks, and the switch `gathering`.

    This is the only place that writes them. `cov_decay`: of the moving average, per refresh.
    """

    def __init__(self, cov_decay: float) -> None:
        self.cov_decay = cov_decay
        self.moments: list[SecondMoment] = []
        self.gathering = True
        self.turn = 0  # number of the refresh that is gathered for
        self.sharing_decided = False
        self._numbers: Diagnostics | None = None
        self._sent_right: DeferredRead | None = None
        self._watched: list[tuple[SecondMoment, LayerView]] = []
        self._backward_ran = False
        # The newest input that layers of one kind, size and rule read, its version and number.
        self._newest: dict[tuple[object, ...], tuple[weakref.ref[Tensor], int, int]] = {}
        self._numbered = itertools.count()
        self._handle = register(self)
        self.removable: list[Any] = []
        """The hooks on the model, which are taken off when this is gone."""
        weakref.finalize(self, _remove_all, self.removable)

    # Gathering

    def watch_inputs(self, moment: SecondMoment, module: nn.Module, view: LayerView) -> None:
        """Feed `moment` with the inputs of `module`."""
        token = torch.zeros(1, device=moment.device)
        hook = InputHook(self._handle, self._number(moment, view), token, view.argument)
        self.removable.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def watch_output_gradients(
        self, moment: SecondMoment, module: nn.Module, view: LayerView
    ) -> None:
        """Feed `moment` with the gradients of the outputs of `module`."""
        hook = OutputGradientHook(self._handle, self._number(moment, view))
        self.removable.append(module.register_forward_hook(hook))

    def _number(self, moment: SecondMoment, view: LayerView) -> int:
        if moment.number < 0:
            moment.number = len(self.moments)
            self.moments.append(moment)
            self.removable.append(_on_gradient(moment.weight, weakref.ref(self)))
        self._watched.append((moment, view))
        return len(self._watched) - 1

    def trains(self, index: int) -> bool:
        """Whether the layer watched as number `index` is trained now."""
        return self._watched[index][0].trains

    @torch.no_grad()
    def gather_input(self, index: int, x: Tensor, traced: bool) -> None:
        """Take in an input of the module watched as number `index`.

        Args:
            traced: torch.compile runs the module, and `x` is not the tensor that other modules see.
        """
        if not self.gathering or is_recomputation():
            return
        moment, view = self._watched[index]
        if self._take(index, x) and not traced:
            moment.reads.append(
                self._tensor_number((*view.key, moment.dtype, moment.max_rows, moment.rule), x)
            )

    @torch.no_grad()
    def gather_output_gradient(self, index: int, grad: Tensor) -> None:
        """Take in a gradient of the output of the module watched as number `index`."""
        if self.gathering:
            self._take(index, grad)

    def _take(self, index: int, x: Tensor) -> bool:
        """Gather `x`, unless the layer is frozen now, as a discriminator in a generator's step;
        returns whether it is not."""
        self._note_backward()
        moment, view = self._watched[index]
        if moment.trains and moment.shared_with is None:
            moment.gather(x.detach(), view, self.turn)
        return moment.trains

    def _tensor_number(self, key: tuple[object, ...], x: Tensor) -> int:
        """A number that layers which can share statistics, and so have one `key`, have in common
        if they read the tensor `x` one after another, unless it was changed in place in between."""
        version = 0 if x.is_inference() else x._version
        newest = self._newest.get(key)
        if newest is None or newest[0]() is not x or newest[1] != version:
            newest = self._newest[key] = weakref.ref(x), version, next(self._numbered)
        return newest[2]

    def _decide_sharing(self) -> None:
        """After the first window: let layers that read the same tensors share one Sigma.

        All ranks must have seen the same. Under torch.compile tensors have no identity, and every
        layer keeps its own.
        """
        self.sharing_decided = True
        first: dict[tuple[int, ...], int] = {}
        leaders = []
        for i, moment in enumerate(self.moments):
            leader = first.setdefault(tuple(sorted(moment.reads)), i)
            leaders.append(leader if moment.reads and leader != i else -1)
        found = agreed(leaders, self.moments[0].device)
        for moment, number in zip(self.moments, found, strict=True):
            if number >= 0:
                moment.share(self.moments[number])

    def _misread(self) -> list[bool]:
        """Which layers share statistics and have read a tensor that their owner has not."""
        owners = [moment.shared_with for moment in self.moments]
        pairs = zip(self.moments, owners, strict=True)
        return [owner is not None and not set(m.reads) <= set(owner.reads) for m, owner in pairs]

    def _refuse(self, misread: Sequence[bool]) -> None:
        """ValueError for a layer that has misread."""
        for moment, wrong in zip(self.moments, misread, strict=True):
            if wrong and moment.shared_with is not None:
                raise ValueError(
                    f"layer {moment.name!r} shares the statistics of layer "
                    f"{moment.shared_with.name!r}, which read the same tensors at first, but it "
                    "has read one that the other layer has not read, or not while training: give "
                    f"it a layer rule of its own, LayerRule('^{re.escape(moment.name)}$'), for "
                    "statistics of its own"
                )

    def discard(self) -> None:
        """Forget what a backward has already used: its step was skipped."""
        self._note_backward()
        for moment in self.moments:
            moment.used = WindowSum()

    def _note_backward(self) -> None:
        """Mark what was gathered as used if a backward has run since."""
        if self._backward_ran:
            self._backward_ran = False
            for moment in self.moments:
                moment.unused.move_into(moment.used)

    def remove_hooks(self) -> None:
        """Take every hook off the model."""
        _remove_all(self.removable)
        unregister(self._handle)

    # Averaging

    def refresh(self) -> None:
        """End the window, sum it over all ranks, and fold the sums that are finite into the
        averages.

        At a layer's refresh k, from 0, the decay is min(cov_decay, (1 + k) / (10 + k)): inputs
        change fastest at the start of training, and a long memory of them would mislead.

        Raises:
            ValueError: a layer that shares statistics has read another tensor; with several
                processes at the next refresh, on all of them.
        """
        misread = self._misread()
        if world_size() == 1:
            self._refuse(misread)
        elif self._sent_right is not None:
            self._refuse([share < 1 for share in self._sent_right.read()])
        windows = self._closed_windows()
        present = [i for i, window in enumerate(windows) if window.total is not None]
        if not present:
            return
        old = self.numbers
        weight = old.ema_weight
        counts = on_device([window.rows for window in windows], weight.device, weight.dtype)
        sums = [total for window in windows if (total := window.total) is not None]
        right = on_device([not wrong for wrong in misread], weight.device, weight.dtype)
        counts, right, *sums = summed([counts, right, *sums])
        if world_size() > 1:
            self._sent_right = DeferredRead(right / world_size())
        traces, sizes = list(torch.zeros_like(weight)), list(counts.clamp_min(1))
        for i, total in zip(present, sums, strict=True):
            traces[i] = total.diagonal(dim1=-2, dim2=-1).sum().to(weight)
            if self.moments[i].free_of_scale:
                mean = traces[i] / total.shape[-1]
                sizes[i] = torch.where(mean > 0, mean, 1.0)
        ran = counts > 0
        good = ran & torch.stack(traces).isfinite()
        decay = ((1 + old.refreshes) / (10 + old.refreshes)).clamp_max(self.cov_decay)
        keep, share = torch.where(good, decay, 1.0), torch.where(good, 1 - decay, 0.0)
        scales = share / torch.stack(sizes)
        for i, total in zip(present, sums, strict=True):
            moment = self.moments[i]
            # A sum that is not finite has a scale of 0, which does not make NaN zero.
            new = total.nan_to_num_(0, 0, 0).mul_(scales[i].to(total))
            old_sigma = moment.sigma
            moment.sigma = (
                new if old_sigma is None else old_sigma.mul_(keep[i].to(old_sigma)).add_(new)
            )
        self._numbers = old._replace(
            ema_weight=keep * weight + share,
            refreshes=old.refreshes + good,
            skipped=old.skipped + (ran & ~good),
        )

    def _closed_windows(self) -> list[WindowSum]:
        """What every layer gathered; nothing for those that share, and on several ranks zeros for
        layers that did not run here, since no rank knows whether they ran on another one."""
        self._backward_ran = False
        if not self.sharing_decided:
            self._decide_sharing()
        windows = [moment.close_window() for moment in self.moments]
        for i, moment in enumerate(self.moments):
            if moment.shared_with is not None:
                windows[i] = WindowSum()
            elif windows[i].total is None and world_size() > 1:
                windows[i].total = moment.zeros(moment.view.shape)
        return windows

    @property
    def numbers(self) -> Diagnostics:
        """The numbers of all layers, zeros before the first refresh, where the first layer is."""
        device = self.moments[0].device
        if self._numbers is None:
            double = any(moment.dtype == torch.float64 for moment in self.moments)
            dtype = torch.float64 if double else torch.float32
            zeros = torch.zeros(len(self.moments), dtype=dtype, device=device)
            self._numbers = Diagnostics(*(zeros.clone() for _ in Diagnostics._fields))
        elif self._numbers.damping.device != device:  # the model was moved
            self._numbers = Diagnostics(*(values.to(device) for values in self._numbers))
        return self._numbers

    def set_damping(self, damping: float) -> None:
        """Use `damping` for the next T, or the higher one that a failed factorisation asked for."""
        numbers = self.numbers
        self._numbers = numbers._replace(damping=numbers.least_damping.clamp_min(damping))

    def raise_damping(self, failed: Tensor) -> None:
        """Multiply the damping by ten, from the next refresh on, where `failed` (n,) is true."""
        numbers = self.numbers
        pivots = [smallest_pivot(moment.dtype) for moment in self.moments]
        least = on_device(pivots, numbers.damping.device, numbers.damping.dtype)
        more = torch.maximum(10 * numbers.damping, least)
        raised = torch.where(failed, more, numbers.least_damping)
        self._numbers = numbers._replace(least_damping=raised)

    def known(self) -> list[int]:
        """Numbers of the layers that have an average, even if all their refreshes were skipped."""
        return [i for i, moment in enumerate(self.moments) if moment.sigma is not None]

    def table(self) -> Tensor:
        """The numbers of the layers in `known`, one row for each, (len(known), 5)."""
        rows = torch.stack(list(self.numbers), 1).unbind()
        return torch.stack([rows[i] for i in self.known()])

    # State

    def diagnostics(self) -> dict[str, Diagnostics]:
        """Layer name -> its numbers now; the host waits for them."""
        table = torch.stack(list(self.numbers), 1).tolist()
        pairs = zip(self.moments, table, strict=True)
        return {m.name: Diagnostics(*row) for m, row in pairs if m.shared_with is None}

    def state_dict(self) -> dict[str, Any]:
        """ "averages": layer name -> the lower triangles of the average of Sigma and the fields of
        its `Diagnostics`; "shared": layer name -> the layer whose average it uses."""
        averages, numbers = {}, self.diagnostics()
        for moment in self.moments:
            of_layer = numbers.get(moment.name)
            if moment.sigma is None or of_layer is None:
                continue
            if of_layer.ema_weight or of_layer.skipped:  # else it ran on no rank
                averages[moment.name] = {"sigma": _packed(moment.sigma), **of_layer._asdict()}
        shared = {m.name: m.shared_with.name for m in self.moments if m.shared_with is not None}
        return {"averages": averages, "shared": shared}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore the averages. Raises ValueError for another layout, layer or shape than here."""
        if not saved.keys() >= {"averages", "shared"}:
            raise ValueError(
                "the optimizer state's entry 'dopr' is of another version of flowdopr: load it "
                "with the version that saved it, or start the run anew"
            )
        known = {moment.name: moment for moment in self.moments}
        averages, shared = saved["averages"], saved["shared"]
        for name in (*averages, *shared, *shared.values()):
            if name not in known or not _fits(averages.get(name), known[name]):
                raise ValueError(
                    f"the optimizer state has statistics of layer {name!r}, which this model lacks "
                    "or treats in another mode: load it into the model, the rules and the version "
                    "of flowdopr that it was saved with"
                )
        rows = []
        for moment in self.moments:
            entry, leader = averages.get(moment.name), shared.get(moment.name)
            moment.shared_with, moment.weights = None, [moment.weight]
            if leader is not None:  # it stands before this layer
                moment.share(known[leader])
            moment.close_window()
            moment.sigma = None if entry is None else _unpacked(entry["sigma"], moment)
            rows.append([0.0 if entry is None else entry[key] for key in Diagnostics._fields])
        self._numbers = None
        zeros = self.numbers.damping
        self._numbers = Diagnostics(*torch.tensor(rows, dtype=zeros.dtype, device=zeros.device).mT)


def _remove_all(removable: list[Any]) -> None:
    for handle in removable:
        handle.remove()
    removable.clear()


def _on_gradient(weight: Tensor, statistics: "weakref.ref[Statistics]") -> Any:
    """A hook that notes that a backward has run; it does not keep the statistics alive."""

    def arrived(_: Tensor) -> None:
        alive = statistics()
        if alive is not None:
            alive._backward_ran = True

    register: Callable[[Any], Any] = weight.register_post_accumulate_grad_hook
    return register(arrived)


def _fits(entry: dict[str, Any] | None, moment: SecondMoment) -> bool:
    if entry is None:
        return True
    groups, blocks, side, _ = moment.view.shape
    shape = (groups, blocks, side * (side + 1) // 2)
    return entry.keys() >= {"sigma", *Diagnostics._fields} and entry["sigma"].shape == shape


def _packed(sigma: Tensor) -> Tensor:
    """The lower triangles of (g, b, s, s), all that the inversion reads, as (g, b, s(s+1)/2)."""
    rows, columns = torch.tril_indices(*sigma.shape[-2:], device=sigma.device)
    return sigma[:, :, rows, columns]


def _unpacked(packed: Tensor, moment: SecondMoment) -> Tensor:
    sigma = moment.zeros(moment.view.shape)
    rows, columns = torch.tril_indices(*sigma.shape[-2:], device=sigma.device)
    sigma[:, :, rows, columns] = packed.to(sigma)
    return sigma
