"""The probes of scripts/ap_forms.py, the measure of scripts/ap_mechanism.py, and the archives of
scripts/cifar10_zips.py."""

import io
import re
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from script_modules import load_script
from torch import Tensor, nn

from flowdopr.flow import FlowMatching, TimeSampler
from flowdopr.models import DiT, UNet
from flowdopr.optim import DoPr, Muon, build_optimizer

forms = load_script("ap_forms.py")
mechanism = load_script("ap_mechanism.py")
zips = load_script("cifar10_zips.py")


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 3, generator=generator, dtype=torch.float64) * torch.tensor([3, 1, 0.3])


def test_a_gradient_is_preconditioned_by_earlier_batches_alone() -> None:
    model = nn.Linear(3, 2).double()
    gp = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = forms.EarlierBatches(gp, model, refresh_every=1, cov_decay=0.0, damping=0.5)
    for step in range(4):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        model(batch(step)).sin().sum().backward()
        grad = model.weight.grad.clone()
        optimizer.step()
        if step:
            x = batch(step - 1)
            sigma = x.T @ x / len(x)
            unit = (sigma / sigma.diagonal().mean() + 0.5 * torch.eye(3)) / 1.5
            grad = torch.linalg.solve(unit, grad, left=False)
        torch.testing.assert_close(model.weight.detach(), before - 0.1 * grad)


@pytest.mark.parametrize("kind", ["Growing", "GrowingAlone", "FadesOut", "SameLength"])
def test_probes_of_the_length_of_a_preconditioned_gradient(kind: str) -> None:
    """By a damping that falls from 4 to 1 in two steps, with Sigma of each batch alone."""
    model = nn.Linear(3, 2, bias=False).double()
    gp = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"refresh_every": 1, "cov_decay": 0.0, "damping": (4.0, 1.0, 2)}
    optimizer = getattr(forms, kind)(gp, model, **options)
    for step, damping in enumerate((4.0, 2.0, 1.0)):
        before, x = model.weight.detach().clone(), batch(step)
        optimizer.zero_grad()
        model(x).sin().sum().backward()
        grad = model.weight.grad.clone()
        optimizer.step()
        sigma, eye = x.T @ x / len(x), torch.eye(3, dtype=torch.float64)
        inverse = torch.linalg.inv(sigma / sigma.diagonal().mean() + damping * eye)
        share, m = 1 - step / forms.FadesOut.END, grad @ inverse
        expected = {
            "Growing": m,
            "GrowingAlone": grad / (1 + damping),
            "FadesOut": share * m + (1 - share) * grad,
            "SameLength": m * grad.norm() / m.norm(),
        }
        torch.testing.assert_close(before - model.weight.detach(), expected[kind])


def test_ap_after_momentum_is_ap_before_it_while_sigma_stays() -> None:
    ends = []
    for kind in (DoPr, forms.AfterMomentum):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        optimizer = kind(Muon(model, lr=0.05), model, refresh_every=100)
        for step in range(6):
            optimizer.zero_grad()
            model(batch(step)).sin().sum().backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends)


class Field(nn.Module):
    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, t: Tensor, y: None = None) -> Tensor:
        return self.layer(torch.cat([x, t[:, None]], 1))


def test_moments_at_other_times_leave_the_gradient_and_change_sigma() -> None:
    plain, late = FlowMatching(), TimeSampler("logit_normal", mean=4.0)
    grads, times = [], []
    for objective in (plain, forms.MomentsAtOtherTimes(plain, late)):
        torch.manual_seed(0)
        model = Field()
        optimizer = DoPr(torch.optim.SGD(model.parameters()), model, cov_decay=0.0)
        draw = objective.draw(64, (3,), generator=torch.Generator().manual_seed(1))
        objective(model, batch(0).float().repeat(4, 1), None, draw).mean().backward()
        grads.append(model.layer.weight.grad.clone())
        optimizer.step()
        (moment,) = optimizer.statistics.moments
        times.append(float(moment.sigma[0, 0, 3, 3] / optimizer.statistics.numbers.ema_weight))
        assert model.training
    torch.testing.assert_close(*grads)
    assert times[0] == pytest.approx(1 / 3, abs=0.1)
    assert times[1] > 0.9


def test_each_band_of_times_is_preconditioned_by_its_own_moments() -> None:
    torch.manual_seed(0)
    model = Field().double()
    weight, before = model.layer.weight, model.layer.weight.detach().clone()
    gp = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = forms.TimeBands(gp, model, damping=0.5, cov_decay=0.0)
    x, t = batch(0), torch.linspace(0, 1, 16, dtype=torch.float64)
    model(x, t).sin().sum().backward()
    step = torch.zeros_like(weight)
    for rows in torch.arange(16).split(4):
        z = torch.cat([x[rows], t[rows, None]], 1)
        sigma = z.T @ z / len(z)
        damped = sigma / sigma.diagonal().mean() + 0.5 * torch.eye(4)
        loss = nn.functional.linear(z, weight, model.layer.bias).sin().sum()
        step += torch.linalg.solve(damped, torch.autograd.grad(loss, weight)[0], left=False)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - step)


def test_one_band_of_times_is_dopr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms.TimeBands, "BANDS", 1)
    ends = []
    for kind in (DoPr, forms.TimeBands):
        torch.manual_seed(0)
        model = DiT((3, 8, 8), num_classes=2, patch_size=4, hidden_size=16, depth=1, num_heads=2)
        optimizer = kind(Muon(model, lr=0.05), model, damping=1.0, refresh_every=2)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            x, t = torch.randn(6, 3, 8, 8, generator=generator), torch.rand(6, generator=generator)
            optimizer.zero_grad()
            model(x, t, torch.zeros(6, dtype=torch.long)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", forms.VARIANTS)
def test_every_variant_builds_a_dopr(name: str) -> None:
    variant = forms.VARIANTS[name]
    options = in_steps(forms.dopr_options(variant))
    if "convolutions" in name:
        model = UNet(
            (3, 8, 8), 2, channels=8, channel_multipliers=(1, 2), attention_resolutions=(4,)
        )
        optimizer = variant.dopr(Muon(model, lr=0.1), model, **options)
        modes = {name: mode for name, _, mode, _ in optimizer.roles()}
        kept = modes["down.0.0.conv_1.weight"], modes["middle.1.attention.qkv.weight"]
        assert [mode == "none" for mode in kept] == [
            name == "without convolutions",
            "alone" in name,
        ]
        return
    model = DiT((3, 8, 8), num_classes=2, patch_size=4, hidden_size=16, depth=1, num_heads=2)
    if options is None:
        assert name == "no AP"
        return
    with forms.probing(variant):
        optimizer = build_optimizer(model, "muon", 0.1, dopr=options)
    modes = {name for name, _, mode, _ in optimizer.roles() if mode != "none"}
    assert ("blocks.0.mlp.down.weight" in modes) == ("mlp.down" not in excluded(options))


def in_steps(options: dict | None) -> dict | None:
    """The options with the share of a run of 600 steps, if the damping has one, in steps."""
    if options is None or not isinstance(options["damping"], tuple):
        return options
    first, last, share = options["damping"]
    return options | {"damping": (first, last, round(share * 600))}


def excluded(options: dict) -> str:
    """Which of the layers of a block a rule leaves to the GP."""
    names = ("mlp.down", "mlp.up")
    patterns = [rule["pattern"] for rule in options.get("rules", ())]
    return " ".join(n for n in names if any(re.search(p, f"blocks.0.{n}") for p in patterns))


def test_the_undamped_inverse_is_the_most_efficient_direction() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 6, dtype=torch.float64) * torch.logspace(0, -2, 6)
    g, sigma = torch.randn(3, 6, dtype=torch.float64), x.T @ x / 200
    best = mechanism.efficiency(torch.linalg.solve(sigma, g, left=False), g, sigma)
    exact = torch.linalg.solve(mechanism.unit(sigma), g, left=False)
    assert best == pytest.approx(float((g * exact).sum()))
    found = {
        n: mechanism.efficiency(d, g, sigma) for n, d in mechanism.directions(g, sigma).items()
    }
    assert max(found.values()) <= best * (1 + 1e-9)
    assert found["AP 0.1, SGD"] > found["SGD"]
    assert mechanism.efficiency(-g, g, sigma) == 0


def test_archives_have_averaged_images_of_the_classes_asked_for(tmp_path, monkeypatch, capsys):
    pixels = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    for split in zips.SPLITS:
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            for of_class in ("cat", "dog"):
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "png")
                archive.writestr(f"{of_class}/a.png", file.getvalue())
    sources = [str(tmp_path / f"{split}.zip") for split in zips.SPLITS]
    out = tmp_path / "out" / "some"
    options = [str(out), "--side", "8", "--classes", "dog", "--archives", *sources]
    monkeypatch.setattr(sys, "argv", ["cifar10_zips.py", *options])
    zips.main()
    assert "some-train.zip: 1 images" in capsys.readouterr().out
    with zipfile.ZipFile(f"{out}-test.zip") as archive:
        assert archive.namelist() == ["dog/00000.png"]
        image = np.asarray(Image.open(io.BytesIO(archive.read("dog/00000.png"))), dtype=float)
    blocks = pixels.reshape(8, 4, 8, 4, 3).astype(float).mean((1, 3))
    assert np.abs(image - blocks).max() <= 1
