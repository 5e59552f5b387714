"""One list of layers with inputs, through which every identity of DoPr runs, in float64,
and a small convolutional model for what concerns training.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowdopr.optim.dopr import DoPr, LayerRule


@dataclass(frozen=True)
class LayerCase:
    """A layer and the shape of an input that has more rows of z than coordinates."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def make(self, seed: int = 0) -> tuple[nn.Module, Tensor]:
        """The layer and an input, both float64."""
        torch.manual_seed(seed)
        module = self.build().double()
        if isinstance(module, nn.Embedding):
            return module, torch.randint(module.num_embeddings - 1, self.shape)
        x = torch.randn(self.shape, dtype=torch.float64)
        return module, 0.5 + x * torch.linspace(0.5, 2, x.shape[-1], dtype=torch.float64)


def conv(*args: int, **kwargs: object) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*args, **kwargs)


CASES = [
    LayerCase("linear", lambda: nn.Linear(5, 3), (40, 5)),
    LayerCase("linear-tokens", lambda: nn.Linear(5, 3, bias=False), (6, 7, 5)),
    LayerCase("conv-1x1", conv(4, 3, 1), (3, 4, 5, 4)),
    LayerCase("conv-3x3", conv(2, 3, 3), (3, 2, 6, 5)),
    LayerCase("conv-padding", conv(2, 3, 3, padding=1), (2, 2, 5, 4)),
    LayerCase("conv-stride", conv(2, 3, 3, stride=2, padding=1), (8, 2, 6, 5)),
    LayerCase("conv-uneven", conv(2, 3, (1, 3), stride=(1, 2), padding=(0, 2)), (4, 2, 4, 6)),
    LayerCase("conv-dilation", conv(2, 3, 3, dilation=2, padding=2), (3, 2, 5, 5)),
    LayerCase("conv-groups", conv(4, 6, 3, groups=2, padding=1), (3, 4, 4, 4)),
    LayerCase("conv-depthwise", conv(3, 3, 3, groups=3), (3, 3, 5, 5)),
    LayerCase("conv-same", conv(2, 3, (3, 5), dilation=(2, 1), padding="same"), (3, 2, 5, 5)),
    LayerCase("conv-valid", conv(2, 3, 2, padding="valid"), (3, 2, 5, 4)),
    LayerCase("conv-circular", conv(2, 3, 3, padding=1, padding_mode="circular"), (3, 2, 4, 4)),
    LayerCase("conv-reflect", conv(2, 3, 3, padding=1, padding_mode="reflect"), (3, 2, 4, 4)),
    LayerCase("conv-replicate", conv(2, 3, 3, padding=2, padding_mode="replicate"), (2, 2, 4, 4)),
    LayerCase("transposed", lambda: nn.ConvTranspose2d(4, 3, 3, stride=2), (3, 4, 4, 4)),
    LayerCase("transposed-groups", lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (3, 4, 4, 3)),
    LayerCase("embedding", lambda: nn.Embedding(7, 3), (5, 6)),
]
IDS = [case.name for case in CASES]
FORMS = {"inverse": {}, "sandwich": {"form": "sandwich"}, "root": {"power": 0.5}}


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 3)
    )


def batch(seed: int) -> Tensor:
    return torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def adamw(model: nn.Module, **settings: object) -> DoPr:
    gp = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return DoPr(gp, model, **{"refresh_every": 3, **settings})


def mean_eigenvalues(optimizer: DoPr) -> Tensor:
    """tr(Sigma) / d of each group of the first layer, (g,): DoPr divides Sigma by it."""
    moment = optimizer.statistics.moments[0]
    average = moment.sigma / optimizer.statistics.numbers.ema_weight[0]
    return moment.view.mean_eigenvalue(moment.view.stack(average)).flatten()


def one_step(
    module: nn.Module, x: Tensor, *, rule: LayerRule | None = None, **settings: object
) -> list[Tensor]:
    """The updates of all parameters in one step of DoPr around SGD with learning rate 1."""
    before = [p.detach().clone() for p in module.parameters()]
    rules = [] if rule is None else [rule]
    exact = {"max_rows": "all", "cov_decay": 0.0, "damping": 0.1, "rules": rules, **settings}
    gp = torch.optim.SGD(module.parameters(), lr=1.0)
    optimizer = DoPr(gp, module, **exact)
    module(x).sin().sum().backward()
    grads = [p.grad for p in module.parameters()]
    optimizer.step()
    for parameter, grad in zip(module.parameters(), grads, strict=True):
        parameter.grad = grad  # G again, where the step has left M
    return [old - new.detach() for old, new in zip(before, module.parameters(), strict=True)]
