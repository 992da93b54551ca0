"""The optimizer and the callback for devinterp 1.3, driven as its sampler drives them, without it."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossk
from lossk.interop.devinterp import LossKernelCallback, rmsprop_sgld, sgld
from lossk.ops.philox import normals

SETTINGS: dict[str, Any] = {"lr": 1e-2, "nbeta": 7.0, "localization": 3.0, "weight_decay": 2.0, "noise_level": 0.5}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(5, 2))


DATA = (torch.randn(12, 3, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 2)


def backward(model: nn.Module) -> None:
    F.cross_entropy(model(DATA[0]), DATA[1]).backward()


def expected_step(
    w: Tensor, g: Tensor, start: Tensor, xi: Tensor, *, gain: Tensor | float = 1.0, mask: Tensor | float = 1.0
) -> Tensor:
    """The step as devinterp's documentation gives it, in float64; xi is of standard deviation noise_level."""
    w, g, start, xi = (t.double() for t in (w, g, start, xi))
    s = SETTINGS
    drift = gain * (s["nbeta"] * g + s["localization"] * (w - start) + s["weight_decay"] * w)
    return w + mask * (-s["lr"] / 2 * drift + (s["lr"] * gain) ** 0.5 * xi)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_step_is_theirs(preconditioned: bool) -> None:
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    square = [torch.zeros_like(p, dtype=torch.float64) for p in start]
    make = rmsprop_sgld if preconditioned else sgld
    optimizer = make(model.parameters(), **SETTINGS, metrics=["noise", "dws"])
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        for i, p in enumerate(model.parameters()):
            gain: Any = 1.0
            if preconditioned:
                square[i] = 0.99 * square[i] + 0.01 * p.grad.double().square()
                gain = 1 / (square[i].sqrt() + 0.1)
            xi = optimizer.noise[0][i]
            expected = expected_step(before[i], p.grad, start[i], xi, gain=gain)
            torch.testing.assert_close(p.detach().double(), expected, rtol=1e-6, atol=1e-6)
            drift = (before[i].double() - expected + (SETTINGS["lr"] * gain) ** 0.5 * xi.double()) * 2 / SETTINGS["lr"]
            torch.testing.assert_close(optimizer.dws[i].double(), drift, rtol=1e-4, atol=1e-4)


def test_the_noise_is_counter_based_and_seeded_by_torch() -> None:
    noises = []
    for seed in (5, 5, 6):
        model = network()
        optimizer = sgld(model.parameters(), **SETTINGS, metrics=["noise"])
        torch.manual_seed(seed)  # devinterp seeds after it has made the optimizer
        steps = []
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model.eval()(DATA[0]), DATA[1]).backward()
            optimizer.step()
            assert [xi.shape for xi in optimizer.noise[0]] == [p.shape for p in model.parameters()]
            steps.append([xi.flatten() for xi in optimizer.noise[0]])
        noises.append(steps)
    flat = [[torch.cat(step) for step in steps] for steps in noises]
    assert torch.equal(flat[0][0], flat[1][0])
    assert not torch.equal(flat[0][0], flat[2][0])
    assert not torch.equal(flat[0][0], flat[0][1])
    assert len(flat[0][0].unique()) == len(flat[0][0])  # no two parameters share their noise
    torch.manual_seed(5)
    key = int(torch.randint(2**32, (), dtype=torch.int64))
    torch.testing.assert_close(noises[0][1][0], 0.5 * normals(key, 0, 1, 15))


def test_what_their_callbacks_read() -> None:
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    names = ["noise", "dws", "localization_loss", "distance", "noise_norm", "grad_norm", "weight_norm"]
    optimizer = sgld(model.parameters(), **SETTINGS, metrics=names)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
    away = sum((b - s).square().sum() for b, s in zip(before, start, strict=True))
    torch.testing.assert_close(optimizer.localization_loss, 1.5 * away)
    torch.testing.assert_close(optimizer.distance, away.sqrt())
    torch.testing.assert_close(optimizer.noise_norm, torch.cat([xi.flatten() for xi in optimizer.noise[0]]).norm())
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(optimizer.grad_norm, gradient.norm() * 7.0 * 0.005)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(optimizer.weight_norm, weights.norm())
    plain = sgld(network().parameters(), **SETTINGS)
    assert plain.noise is None
    assert plain.dws is None


@pytest.mark.parametrize("key", ["optimize_over", "mask"])
def test_masks_in_groups(key: str) -> None:
    """devinterp 1.3 says "optimize_over" and 2.x "mask", one parameter to a group."""
    weight, bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    optimizer = sgld([{"params": weight, key: mask}, {"params": [bias], key: None}], **SETTINGS)
    (weight.sum() + bias.sum()).backward()
    optimizer.step()
    assert torch.equal(weight == 1, mask == 0)
    assert (bias != 1).all()


def test_a_parameter_without_gradient_stays() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = sgld([used, unused], **SETTINGS)
    used.sum().backward()
    optimizer.step()
    assert (used != 1).all()
    assert torch.equal(unused.detach(), torch.ones(3))


def test_the_box() -> None:
    p = nn.Parameter(torch.zeros(1000))
    optimizer = sgld([p], lr=1.0, nbeta=2.0, bounding_box_size=0.25)
    for _ in range(3):
        optimizer.zero_grad()
        p.sum().backward()
        optimizer.step()
    assert float(p.detach().abs().amax()) == 0.25


def test_not_contiguous_and_scalar_parameters() -> None:
    wide = nn.Parameter(torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    one = nn.Parameter(torch.tensor(2.0))
    optimizer = sgld([wide, one], **SETTINGS, metrics=["noise"])
    before = wide.detach().clone()
    (wide.sum() + one).backward()
    optimizer.step()
    expected = expected_step(before, wide.grad, before, optimizer.noise[0][0])
    torch.testing.assert_close(wide.detach().double(), expected, rtol=1e-6, atol=1e-6)
    assert one.shape == ()
    assert float(one.detach()) != 2.0


def test_small_steps_in_bfloat16_add_up() -> None:
    """Variance of the prior alone, 1 / localization: a chain rounded at each step makes it several times too large."""
    p = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = sgld([p], lr=1e-3, nbeta=1.5, localization=100.0)
    for _ in range(100):  # the correlation with w* is (1 - lr 100 / 2)^100 = 0.006
        optimizer.zero_grad()
        (0 * p).sum().backward()
        optimizer.step()
    variance = 0.01 / (1 - 1e-3 * 100 / 4) + 2.0**-16 / 12 * 4  # Euler's, and rounding of numbers near 1
    assert abs(float((p.detach().float() - 1).square().mean()) / variance - 1) < 5 * (2 / 4000) ** 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr must be"),
        ({"nbeta": -1.0}, "nbeta must be"),
        ({"metrics": ["speed"]}, "metrics must be of"),
        ({"optimize_over": [torch.tensor([0.5])]}, "0 and 1"),
        ({"optimize_over": [1, 1]}, "one mask per parameter"),
        ({"save_metrics": True}, "save_metrics must be False"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sgld([nn.Parameter(torch.zeros(1))], **(SETTINGS | changes))


def run(callback: LossKernelCallback, model: nn.Module, chains: int, draws: int) -> list[Tensor]:
    """As their sampler: train mode, a step, a callback with everything it has at hand. The true eval-mode losses."""
    truth = []
    for chain in range(chains):
        optimizer = sgld(model.parameters(), lr=1e-3, nbeta=10.0, localization=1.0)
        for draw in range(draws):
            model.train()
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
            with torch.no_grad():
                callback(chain=chain, draw=draw, model=model, optimizer=optimizer, loss=None, data=DATA)
                assert all(module.training for module in model.modules())
                buffers = [buffer.clone() for buffer in model.buffers()]
                model.eval()
                truth.append(F.cross_entropy(model(DATA[0]), DATA[1], reduction="none"))
                assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    return truth


def test_the_callback_builds_the_kernel_of_eval_mode_losses() -> None:
    callback = LossKernelCallback(2, 5, DATA, batch_size=5, nbeta=10.0)
    truth = torch.stack(run(callback, network(), 2, 5)).view(2, 5, 12)
    callback.finalize()
    results = callback.get_results()
    torch.testing.assert_close(callback.losses, truth, rtol=1e-5, atol=1e-6)
    expected = lossk.LossKernel.from_traces(lossk.LossTraces(callback.losses))
    assert torch.equal(results["loss_kernel"][:], expected[:])
    assert results["loss_kernel/trace"].shape == (2, 5, 12)


def test_the_callback_says_which_draw_is_missing() -> None:
    callback = LossKernelCallback(3, 4, DATA)
    run(callback, network(), 2, 4)
    with pytest.raises(ValueError, match="chain 2, draw 0"):
        callback.get_results()


def test_the_callback_shares_its_state_between_processes() -> None:
    callback = LossKernelCallback(1, 2, DATA)
    assert callback.losses.is_shared()
    assert callback.share_memory_() is callback
    pickle.dumps(callback.loss)


def test_the_callback_refuses_early() -> None:
    with pytest.raises(ValueError, match="loss must be"):
        LossKernelCallback(1, 2, DATA, loss="entropy")
    with pytest.raises(ValueError, match="num_draws must be at least 2"):
        LossKernelCallback(1, 1, DATA)
