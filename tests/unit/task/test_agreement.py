"""What is sampled, what is read and what the user's model computes are one function, or the call is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bench.studies import check_cost
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import lossk

Build = Callable[..., lossk.LossKernel]


def fixed(sgld: Any, **changes: Any) -> dict[str, Any]:
    """A chain that stays at w*: every draw's losses are those of the trained weights."""
    return {"sampler": sgld(lr=1e-30, **changes), "num_chains": 1, "num_draws": 2, "progress": False}


def own_losses(model: nn.Module, call: Callable[[], Tensor], targets: Tensor) -> np.ndarray:
    """[N] float64: the losses of the user's own call in eval mode."""
    was = model.training
    model.eval()
    losses = F.cross_entropy(call().double(), targets, reduction="none").detach().numpy()
    model.train(was)
    return losses


# --- rewritings --------------------------------------------------------------------------------------------------


class Conditioned(nn.Module):
    """Folding traces it; an optional second argument changes what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 3)
        self.film = nn.Linear(2, 3)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = self.norm(self.conv(x))
        if context is not None:
            hidden = hidden * self.film(context)[:, :, None, None]
        return self.head(hidden.relu().mean((2, 3)))


def conditioned() -> Conditioned:
    model = Conditioned()
    model(torch.randn(40, 1, 6, 6))  # moves the running statistics
    return model


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "absent": lambda x, context: x,
    "positional": lambda x, context: (x, context),
    "by keyword": lambda x, context: {"x": x, "context": context},
    "absent by keyword": lambda x, context: {"x": x},
}


@pytest.mark.parametrize("form", FORMS)
def test_folded_norms_take_the_arguments_that_the_data_give(form: str, sgld: Any) -> None:
    model, x, context, targets = conditioned(), torch.randn(12, 1, 6, 6), torch.randn(12, 2), torch.arange(12) % 3
    given = FORMS[form](x, context)
    kept = lossk.sample_losses(
        model, (given, targets), passes=lossk.Passes(fold_norms=True, frozen_prefix=False), **fixed(sgld)
    )
    call = (
        (lambda: model(**given))
        if isinstance(given, dict)
        else lambda: model(*given if isinstance(given, tuple) else [x])
    )
    np.testing.assert_allclose(kept.losses[0, 0], own_losses(model, call, targets), rtol=1e-4)
    assert kept.meta["passes"]["fold_norms"]


class Baked(Conditioned):
    """Tracing keeps the number that the example had: a silent error of any trace."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        scale = 1.0 if isinstance(x, torch.fx.Proxy) else 2.0
        return scale * super().forward(x, context)


class Failing(Conditioned):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        out = super().forward(x, context)
        return out + torch.ones(2, 7) if isinstance(x, torch.fx.Proxy) else out


@pytest.mark.parametrize("kind", [Baked, Failing])
def test_a_rewriting_that_is_not_the_model_is_not_used(kind: type[Conditioned], sgld: Any) -> None:
    model, x, targets = kind(), torch.randn(12, 1, 6, 6), torch.arange(12) % 3
    kept = lossk.sample_losses(model, (x, targets), passes=lossk.Passes(fold_norms=True), **fixed(sgld))
    np.testing.assert_allclose(kept.losses[0, 0], own_losses(model, lambda: model(x), targets), rtol=1e-4)
    assert not kept.meta["passes"]["fold_norms"]
    assert any(reason.startswith("fold_norms = not used") for reason in kept.meta["passes_reasons"])


def test_a_compiler_that_changes_the_model_is_not_used(
    problem: Any, monkeypatch: pytest.MonkeyPatch, sgld: Any
) -> None:
    def compiled(network: nn.Module, **_: Any) -> Callable[..., Tensor]:
        return lambda *inputs: network(*inputs) + torch.tensor([0.0, 0.0, 0.01])

    monkeypatch.setattr(torch, "compile", compiled)
    model = problem.model()
    kept = lossk.sample_losses(model, problem.data, passes=lossk.Passes(compile=True), **fixed(sgld))
    expected = own_losses(model, lambda: model(problem.inputs), problem.targets)
    np.testing.assert_allclose(kept.losses[0, 0], expected, rtol=1e-4)
    assert any(reason.startswith("compile = not used") for reason in kept.meta["passes_reasons"])


def test_a_model_that_needs_contiguous_activations_runs_in_them(sgld: Any) -> None:
    class Flat(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x).view(len(x), -1))  # fails on channels-last activations

    model, x, targets = Flat(nn.Conv2d(2, 4, 3), nn.Linear(64, 3)), torch.randn(9, 2, 6, 6), torch.arange(9) % 3
    kept = lossk.sample_losses(model, (x, targets), **fixed(sgld))
    np.testing.assert_allclose(kept.losses[0, 0], own_losses(model, lambda: model(x), targets), rtol=1e-5)
    assert any("channels_last is not used" in reason for reason in kept.meta["passes_reasons"])


# --- plain ways of running the model -----------------------------------------------------------------------------


class OnlyWithGradients(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if torch.is_grad_enabled() else 1.3)


class OnlyAlone(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 + 0.1 * len(x))


class OnlyInSmallBatches(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if len(x) < 100 else 1.3)


class Random(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


class Memory(nn.Linear):
    """Keeps what it computed from its weights, as a module does that is meant for inference."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "doubled"):
            self.doubled = (2 * self.weight).detach()
        return F.linear(x, self.weight + self.doubled, self.bias)


class Renormalizing(nn.Module):
    def __init__(self, *_: int) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(5, 4, max_norm=0.5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table((x[:, 0].abs() * 2).long().clamp(max=4)))


class Counting(nn.Linear):
    """Writes into a frozen parameter by its data, which no version counter sees."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.steps = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.steps.data += 1
        return super().forward(x)


class Detached(nn.Linear):
    """One of its weights is taken out of the graph, but not out of the function."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.table = nn.Parameter(torch.randn(sizes[1]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.table.detach()


class Reentrant(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(torch.is_grad_enabled())
        return checkpoint(super().forward, x, use_reentrant=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OnlyWithGradients, r"sample \d+ has loss \d.* as you call the model .*but \d.* without gradients"),
        (OnlyAlone, "must not depend on the other samples of its batch"),
        (OnlyInSmallBatches, r"as you call the model .* but .* in a probe pass of 150 samples"),
        (Random, "must be deterministic in eval mode"),
        (Memory, r"keeps .* from an earlier pass"),
        (Renormalizing, r"embedding_renorm_.* writes into parameter 'table.weight'"),
        (Counting, r"add_.* writes into parameter 'steps'"),
        (Reentrant, r"does not reach: weight, bias; .* use_reentrant=False"),
        (lambda *sizes: nn.Sequential(nn.Linear(4, 4), Reentrant(*sizes)), "use_reentrant=False"),
        (Detached, r"does not reach: table; .*detach\(\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_model_that_is_several_functions_is_refused(build: Build, kind: type[nn.Module], message: str) -> None:
    model = kind(4, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        build(model, (torch.randn(150, 4), torch.arange(150) % 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "doubled")


class Scaled(torch.autograd.Function):
    """The identity, with a gradient three times too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient


class Hooked(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.weight.register_hook(torch.neg)


class Estimated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Scaled.apply(super().forward(x))


@pytest.mark.parametrize("kind", [Hooked, Estimated])
def test_a_gradient_that_is_not_the_slope_is_told(build: Build, kind: type[nn.Module]) -> None:
    with pytest.warns(UserWarning, match="gradient of the loss is not its slope"):
        build(kind(4, 3), (torch.randn(20, 4), torch.arange(20) % 3))


def test_a_cache_of_what_does_not_depend_on_weights_is_used(build: Build, sgld: Any) -> None:
    """A mask built in the first forward pass, whatever the mode of that pass."""

    class Masked(nn.Linear):
        cache: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None or len(self.cache) != x.shape[1]:
                self.cache = torch.linspace(0.5, 1.5, x.shape[1])
            return super().forward(x * self.cache)

    model, x, targets = Masked(4, 3), torch.randn(12, 4), torch.arange(12) % 3
    kernel = build(model, (x, targets))
    assert "cache" not in vars(model)
    F.cross_entropy(model(x), targets).backward()  # an inference tensor left behind would fail here
    plain = nn.Linear(4, 3)
    plain.load_state_dict(model.state_dict())
    expected = build(plain, (x * torch.linspace(0.5, 1.5, 4), targets))
    np.testing.assert_allclose(kernel.to_numpy(), expected.to_numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_casts_to_a_fixed_dtype_is_refused_in_words(build: Build, dtype: torch.dtype) -> None:
    class Casting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(dtype))

    with pytest.raises(ValueError, match=rf"{dtype} parameters .* float32 weights that lossk samples"):
        build(Casting(4, 3).to(dtype), (torch.randn(9, 4), torch.arange(9) % 3))


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_weights_that_fit_all_samples_raise_no_doubt(build: Build, scale: float) -> None:
    """The loss there, and its gradient, are of rounding: no step along it changes anything foretold."""
    x = scale * torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(5, 1)
    with torch.no_grad():
        targets = (x.double() @ model.weight.T.double() + model.bias.double()).float()  # off by a rounding
    build(model, (x, targets), loss="mse")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_deep_models_are_not_refused_in_low_precision(build: Build, precision: str) -> None:
    """Fourteen layers add up the roundings of each; the bound is measured on the model."""
    layers = [nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU()) for _ in range(14)]
    model = nn.Sequential(nn.Linear(4, 32), *layers, nn.Linear(32, 3))
    kernel = build(model, (torch.randn(20, 4), torch.arange(20) % 3), precision=precision)
    assert np.isfinite(kernel.to_numpy()).all()


# --- refused by name ---------------------------------------------------------------------------------------------


class Sharded(nn.Parameter):
    """As a parameter under FSDP2 is told from others."""

    device_mesh = "mesh"


def sharded() -> nn.Module:
    model = nn.Linear(4, 3)
    model.weight.__class__ = Sharded
    return model


def quantised() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model.register_buffer("table", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    return model


def sparse() -> nn.Module:
    model = nn.Linear(4, 3)
    model.register_buffer("edges", torch.eye(4).to_sparse())
    return model


def inference() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (sharded, r"parameter 'weight' is sharded over processes"),
        (lambda: nn.Linear(4, 3, device="meta"), r"parameter 'weight' is on the meta device"),
        (quantised, r"buffer 'table' is quantised"),
        (sparse, r"buffer 'edges' is sparse"),
        (lambda: nn.Linear(4, 3, dtype=torch.complex64), r"real floating point, weight is torch.complex64"),
        (inference, r"weight was made under torch.inference_mode"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*torch.ao.quantization:DeprecationWarning")
def test_models_that_cannot_be_sampled_are_named(build: Build, make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(make(), (torch.randn(9, 4), torch.arange(9) % 3))


def test_cached_parametrizations_are_named(build: Build) -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    data = torch.randn(9, 4), torch.arange(9) % 3
    with parametrize.cached(), pytest.raises(ValueError, match=r"parametrize.cached\(\)"):
        build(model, data)
    assert np.isfinite(build(model, data).to_numpy()).all()


def test_what_it_costs_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["check_cost", "--tiny"])
    check_cost.main()
    assert "| causal LM, 16 x 8 tokens" in capsys.readouterr().out
