"""The fused AdamW: where it is used, and that DoPr, resume and GradScaler work with it."""

import pytest
import torch
from layer_cases import CASES, IDS, LayerCase, batch, small_model

from flowdopr.optim import DoPr, build_optimizer


def test_is_fused_where_torch_can() -> None:
    gaps = small_model()
    gaps[3].weight = torch.nn.Parameter(torch.zeros(8, 128)[:, ::2])
    transposed = small_model()
    transposed[3].weight = torch.nn.Parameter(torch.zeros(64, 8).T)
    for model in (small_model(), small_model().to(memory_format=torch.channels_last)):
        assert build_optimizer(model, "adamw", 0.1).param_groups[0]["fused"]
    for model in (small_model().to("meta"), gaps, transposed):
        assert build_optimizer(model, "adamw", 0.1).param_groups[0]["fused"] is None


@pytest.mark.parametrize("dopr", [None, {}])
@pytest.mark.parametrize("layouts", [(0, 1), (1, 0), (1, 1)], ids=str)
def test_state_may_come_from_another_memory_format(
    dopr: dict | None, layouts: tuple[int, int]
) -> None:
    """Two steps, save, two more: channels-last weights take the steps of contiguous ones."""
    formats = (torch.contiguous_format, torch.channels_last)
    runs = []
    for first, second in ((0, 0), layouts):
        weights, state = small_model().state_dict(), None
        for start, layout in ((0, first), (2, second)):
            model = small_model().to(memory_format=formats[layout])
            model.load_state_dict(weights)
            optimizer = build_optimizer(model, "adamw", 0.01, dopr=dopr)
            if state is not None:
                optimizer.load_state_dict(state)
            for step in (start, start + 1):
                optimizer.zero_grad()
                model(batch(step)).square().mean().backward()
                optimizer.step()
            weights, state = model.state_dict(), optimizer.state_dict()
        runs.append([p.detach() for p in model.parameters()])
    for ours, expected in zip(*runs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("settings", [{}, {"conv_mode": "sua"}, {"form": "sandwich"}])
def test_dopr_steps_fused_as_it_does_unfused(case: LayerCase, settings: dict) -> None:
    """On the CPU the fused kernel reads gradients in memory order: M must be laid out as W is."""
    weights = []
    for fused in (True, False):
        module, x = case.make()
        gp = torch.optim.AdamW(module.parameters(), lr=0.01, fused=fused)
        optimizer = DoPr(gp, module, refresh_every=2, **settings)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).sin().sum().backward()
            optimizer.step()
            assert all(p.grad.stride() == p.stride() for p in module.parameters())
        weights.append(module.weight.detach())
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.parametrize("dopr", [None, {}])
@pytest.mark.parametrize("unscale", [True, False], ids=["unscaled by the caller", "by the scaler"])
def test_grad_scaler_unscales_before_the_step_and_skips_an_overflow(
    dopr: dict | None, unscale: bool
) -> None:
    runs = []
    for scale in (1.0, 1024.0):
        model = small_model()
        optimizer = build_optimizer(model, "adamw", 0.01, dopr=dopr)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        steps_taken = []
        optimizer.register_step_pre_hook(lambda *_, taken=steps_taken: taken.append(1))
        for step in [0, 100, 1, 2] if scale > 1 else [0, 1, 2]:
            optimizer.zero_grad()
            factor = float("inf") if step == 100 else 1.0
            scaler.scale(model(batch(step)).square().mean() * factor).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert len(steps_taken) == 3  # accelerate tells a skipped step by the missing call
        runs.append([p.detach() for p in model.parameters()])
    for ours, expected in zip(*runs, strict=True):
        torch.testing.assert_close(ours, expected)
