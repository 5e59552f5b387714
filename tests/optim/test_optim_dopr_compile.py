"""torch.compile: the hooks are in the one graph, and refresh steps do not recompile it."""

import pytest
import torch
from layer_cases import adamw, batch, small_model
from torch._dynamo.utils import counters

from flowdopr.optim.dopr import DoPr


def test_a_compiled_model_gathers_without_recompiling() -> None:
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = small_model()
        optimizer = adamw(model, refresh_every=3, max_rows=50)
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for step in range(7):
            optimizer.zero_grad()
            forward(batch(step)).square().mean().backward()
            counts = [s.unused.rows for s in optimizer.statistics.moments]
            assert counts == ([96, 6, 6] if step % 3 == 0 else [0, 0, 0])
            optimizer.step()
        assert counters["stats"].get("unique_graphs", 0) == int(compiled)
        runs.append([p.detach() for p in model.parameters()])
    for eager, traced in zip(*runs, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_float32_statistics(dtype: torch.dtype) -> None:
    model = small_model().to(dtype)
    optimizer = DoPr(torch.optim.SGD(model.parameters(), lr=0.01), model, refresh_every=3)
    for step in range(4):
        optimizer.zero_grad()
        model(batch(step).to(dtype)).square().mean().backward()
        optimizer.step()
    assert {s.sigma.dtype for s in optimizer.statistics.moments if s.sigma is not None} == {
        torch.float32
    }
    assert all(p.dtype == dtype and torch.isfinite(p).all() for p in model.parameters())


def test_autocast_does_not_reach_the_statistics() -> None:
    sigmas = []
    for enabled in (False, True):
        model = small_model()
        optimizer = adamw(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(batch(0)).square().mean()
        loss.backward()
        optimizer.step()
        sigmas.append(optimizer.statistics.moments[0].sigma)
    assert torch.equal(*sigmas)
