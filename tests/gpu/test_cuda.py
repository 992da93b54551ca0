"""Every way through the engine on a CUDA device: on a GPU where TRITON_INTERPRET=0 says that there is one, else on a
stand-in that refuses what a GPU would refuse (tests/cuda_standin.py). The numbers are those of the CPU.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import Classification, FailAt, sgld
from tests.cuda_standin import MEMORY, StandIn, Stream
from torch import Tensor, nn

import lossk
from lossk.analysis import baselines
from lossk.analysis.influence_functions import damped_influence
from lossk.ops.triton_kernels import OPS

REAL = os.environ["TRITON_INTERPRET"] == "0"


@contextmanager
def cuda(free: int = MEMORY) -> Iterator[StandIn | None]:
    """A CUDA device: the real one, or the stand-in with so many bytes free."""
    if REAL:
        yield None
        return
    with StandIn(free) as standin:
        yield standin


class Tokens(nn.Module):
    """A language model of seven words, without context."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 6), nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)))


def classification() -> tuple[nn.Module, Any, dict[str, Any]]:
    problem = Classification()
    return problem.model(), problem.data, {}


def regression() -> tuple[nn.Module, Any, dict[str, Any]]:
    problem = Classification()
    return problem.model(), (problem.inputs, torch.randn(21, 3)), {"loss": "mse"}


def tokens() -> tuple[nn.Module, Any, dict[str, Any]]:
    words = torch.randint(0, 7, (2, 9, 5))
    words[1, 3, 2:] = -100
    return Tokens(), (words[0], words[1]), {"loss": "token_cross_entropy"}


def images() -> tuple[nn.Module, Any, dict[str, Any]]:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)]
    data = torch.randint(0, 256, (21, 3, 8, 8), dtype=torch.uint8), torch.arange(21) % 3
    return nn.Sequential(*layers), data, {"transform": lambda x: (x.float() - 127.0) / 64.0}


Problem = Callable[[], tuple[nn.Module, Any, dict[str, Any]]]
FIXED: dict[str, Any] = {"localization": 5.0, "n_beta": 30.0}
BAOAB = lossk.BAOAB(step_size=0.01, friction=1.0, batch_size=4, num_burnin_steps=3, num_steps_bw_draws=2, **FIXED)
PATHS: list[tuple[str, Problem, dict[str, Any]]] = [
    ("SGLD", classification, {}),
    ("averaged", classification, {"sampler": sgld(integrator="leimkuhler-matthews")}),
    ("RMSprop", classification, {"sampler": sgld(preconditioner="rmsprop", measure_acceptance=True)}),
    ("control", classification, {"sampler": sgld(control_variate=True, noise_correction=True, metric="fisher")}),
    ("BAOAB", classification, {"sampler": BAOAB}),
    ("HMC", classification, {"sampler": lossk.HMC(step_size=0.01, num_leapfrog_steps=2, **FIXED)}),
    ("Laplace", regression, {"sampler": lossk.Laplace(**FIXED)}),
    ("Laplace of tokens", tokens, {"sampler": lossk.Laplace(structure="diagonal", **FIXED)}),
    ("Gaussian", images, {"sampler": lossk.Gaussian(sigma=0.01)}),
    ("factor", classification, {"form": "factor"}),
    ("pooled", regression, {"centering": "pooled"}),
    ("tokens", tokens, {}),
    ("images", images, {}),
    ("head only", images, {"sampler": sgld(params=["4.*"])}),
    ("bf16", images, {"precision": "bf16"}),
    ("fp16", images, {"precision": "fp16"}),
    ("compiled", images, {"passes": lossk.Passes(compile=True)}),
    ("graphs", images, {"passes": lossk.Passes(compile="graphs")}),
    ("contiguous", images, {"passes": lossk.Passes(memory_format="contiguous", fold_norms=True)}),
    ("overlapped", images, {"passes": lossk.Passes(overlap=True, probe_batch=5, gradient_batch=2)}),
    ("in turns", images, {"passes": lossk.Passes(overlap=False)}),
]


def on_cpu(model: nn.Module, data: Any, **settings: Any) -> lossk.LossKernel:
    return lossk.build_kernel(model, data, **settings)


def settings_of(asked: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "sampler": sgld(), "num_chains": 2, "num_draws": 4, "tile": 16, "panel": 3, "backend": "torch",
        "progress": False,
    }  # fmt: skip
    return plain | asked


def read(kernel: lossk.LossKernel) -> np.ndarray:
    """Everything a user reads first; the matrix is returned."""
    kernel.neighbors(k=3)
    assert "R-hat" in str(kernel.diagnostics) or kernel.diagnostics is not None
    return kernel.to_numpy()


def assert_close(found: np.ndarray, expected: np.ndarray, precision: str | None) -> None:
    """By the largest entry: float32 rounding, or that of halves, in the passes of another device."""
    bound = {None: 1e-3, "bf16": 0.3, "fp16": 0.1}[precision] if REAL else 1e-4
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * float(np.abs(expected).max()))


@pytest.mark.parametrize(("problem", "asked"), [each[1:] for each in PATHS], ids=[each[0] for each in PATHS])
def test_every_path_gives_the_numbers_of_the_cpu(problem: Problem, asked: dict[str, Any]) -> None:
    model, data, own = problem()
    settings = settings_of(own | asked)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quiet = {"passes": lossk.Passes()} if getattr(asked.get("passes"), "compile", False) else {}
    expected = on_cpu(model, data, **settings | quiet)
    with cuda():
        found = read(lossk.build_kernel(model, data, device="cuda", **settings))
    assert_close(found, expected.to_numpy(), asked.get("precision"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("problem", [classification, tokens, images], ids=["samples", "tokens", "images"])
@pytest.mark.parametrize("free", [600, 5000], ids=["streamed", "tiles visit"])
def test_little_memory(problem: Problem, free: int) -> None:
    model, data, own = problem()
    settings = settings_of(own)
    with cuda(free):
        found = lossk.build_kernel(model, data, device="cuda", **settings)
        matrix = read(found)
    assert_close(matrix, on_cpu(model, data, **settings).to_numpy(), None)
    if not REAL:
        assert any("streamed" in line for line in found.meta["passes_reasons"]) or free > 600
        assert found.meta["memory"]["tiles"] == "memory"


def test_streamed_data_are_copied_on_one_stream() -> None:
    made = []
    for draws in (2, 6):
        model, data, own = classification()
        with StandIn(600):
            kernel = lossk.build_kernel(model, data, device="cuda", **settings_of(own | {"num_draws": draws}))
            made.append(Stream.made)
        assert any("streamed" in line for line in kernel.meta["passes_reasons"])
    assert made[0] == made[1] <= 6  # of copies one; of each chain's probe; of the tiles; the current one


@pytest.mark.parametrize(
    "sampler", [lossk.SGLD(), lossk.BAOAB(), lossk.Laplace(), lossk.SGLD(localization="fisher")], ids=repr
)
def test_automatic_settings(sampler: Any) -> None:
    model, data, _ = classification()
    with cuda():
        settings = settings_of({"sampler": sampler, "num_chains": 1, "num_draws": 3})
        kernel = lossk.build_kernel(model, data, device="cuda", **settings)
        assert np.isfinite(read(kernel)).all()
    assert type(kernel.meta["sampler"]) is dict
    assert "auto" not in kernel.meta["sampler"].values()


@pytest.mark.parametrize("form", ["tiles", "factor"])
def test_a_killed_run_is_resumed(form: str, tmp_path: Path) -> None:
    model, data, _ = classification()
    settings = settings_of({"form": form})
    expected = on_cpu(model, data, **settings)
    with cuda():
        out = {"out": tmp_path / "a.lossk", "device": "cuda"}
        with pytest.raises(RuntimeError, match="stopped by the test"):
            lossk.build_kernel(model, data, loss=FailAt(45), **out, **settings)
        kernel = lossk.build_kernel(model, data, loss=FailAt(), resume=True, **out, **settings)
        assert_close(read(kernel), expected.to_numpy(), None)
        assert_close(lossk.open(tmp_path / "a.lossk").to_numpy(), expected.to_numpy(), None)


def test_traces_rectangles_sets_and_baselines() -> None:
    model, data, _ = classification()
    few = (data[0][:7], data[1][:7])
    settings = {name: value for name, value in settings_of({}).items() if name not in ("tile", "panel")}
    with cuda():
        traces = lossk.sample_losses(model, data, device="cuda", **settings)
        rectangle = lossk.cross_kernel(model, data, few, device="cuda", **settings)[:, :]
        sets = lossk.ProbeSets(a=data, b=few)
        together = lossk.build_kernel(model, sets, train=data, device="cuda", **settings_of({})).to_numpy()
        model.cuda()
        similar = baselines.gradient_cosine(model, data).features
        baselines.penultimate_features(model, data)
        baselines.gradient_norms(model, data)
        baselines.confusion(model, data)
        inverse = damped_influence(model, data, train=data, damping=0.1).features
    np.testing.assert_allclose(
        traces.losses.numpy(), lossk.sample_losses(model, data, **settings).losses.numpy(), rtol=1e-3, atol=1e-5
    )
    assert rectangle.shape == (21, 7)
    assert together.shape == (28, 28)
    assert not similar.is_cuda
    assert torch.isfinite(inverse).all()


def test_the_kernels_of_triton_in_a_whole_run() -> None:
    model, data, own = images()
    settings = settings_of(own | {"num_draws": 3, "sampler": sgld(num_burnin_steps=0, num_steps_bw_draws=1)})
    with cuda() as standin:
        kernel = lossk.build_kernel(model, data, device="cuda", **settings | {"backend": "auto"})
        matrix = read(kernel)
    assert set(kernel.meta["ops"].values()) == {"triton"}, kernel.meta["passes_reasons"]
    assert_close(matrix, on_cpu(model, data, **settings).to_numpy(), None)
    if standin is not None:
        ran = {name for name in standin.launches if name.startswith("triton ")}
        assert ran == {f"triton {op}" for op in OPS}


def waits_of(steps: int, draws: int) -> Counter[tuple[str, str]]:
    model, data, _ = classification()
    with StandIn() as standin:
        sampler = sgld(num_burnin_steps=0, num_steps_bw_draws=steps)
        asked = {"sampler": sampler, "num_chains": 1, "num_draws": draws, "panel": draws}
        lossk.build_kernel(model, data, device="cuda", **settings_of(asked))
    return standin.waits


def test_the_host_waits_once_a_step_and_twice_a_draw() -> None:
    waits_of(1, 2)  # what is tested once a process
    few, more, longer = waits_of(1, 2), waits_of(1, 12), waits_of(3, 12)
    assert sum((more - few).values()) <= 10 * (1 + 2), more - few
    assert sum((longer - more).values()) <= 12 * 2, longer - more


def test_the_standin_refuses_what_cuda_refuses() -> None:
    with StandIn() as standin:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert there.device == torch.device("cuda:0")
        assert (there + torch.tensor(1.0)).is_cuda
        assert there[torch.tensor([0, 2])].is_cuda
        assert not there.cpu().is_cuda
        assert here.to("cuda", torch.float64).dtype == torch.float64
        assert torch.zeros_like(there, device="cpu").device.type == "cpu"
        for call in (
            lambda: here + there, lambda: torch.cat([here, there]), there.numpy, lambda: here[there.long()],
            there.pin_memory, lambda: torch.dot(there, torch.linspace(0, 1, 3)), lambda: np.asarray(there),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match=r"device|numpy|pinned"):
                call()
        before = sum(standin.waits.values())
        assert float(there.sum()) == 3.0
        assert bool((there > 0).all())
        assert len(there[there > 0]) == 3
        assert sum(standin.waits.values()) == before + 3
    assert torch.ones(3).device.type == "cpu"
    assert Stream.made == 1
