"""torch's own criteria as losses per sample: their batch means are torch's; what has none is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossk
from conftest import Classification, sgld
from lossk.task.losses import Evaluated, resolve_loss

N, C, T = 13, 5, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CLASSES = torch.arange(N) % C
TOKENS = torch.arange(N * T).reshape(N, T) % C
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.1, 3.0])


class Given(nn.Module):
    """Gives the outputs that are its batch's inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def losses_of(loss: Any, outputs: Tensor, targets: Tensor, backend: str = "torch") -> Evaluated:
    found = resolve_loss(loss, backend)
    found.check((outputs, targets), None)
    found.check((outputs, targets), outputs)
    return found.evaluate(Given(), (outputs, targets))


def reduced(criterion: nn.Module, losses: Tensor, mask: Tensor | None) -> Tensor:
    rows = losses if mask is None else losses[mask]
    return rows.sum() if criterion.reduction == "sum" else rows.mean()


REAL = (draw(N, 3, 2), draw(N, 3, 2, seed=1))
LABELS = (draw(N, C), (draw(N, C, seed=1) > 0).float())
SIGNS = (draw(N, C), (draw(N, C, seed=1) > 0).float() * 2 - 1)
PROBABILITIES = (draw(N, C).log_softmax(1), draw(N, C, seed=1).softmax(1))
KINDS: list[tuple[Callable[..., nn.Module], tuple[Tensor, Tensor]]] = [
    (nn.CrossEntropyLoss, (draw(N, C), CLASSES)),
    (nn.CrossEntropyLoss, (draw(N, C, T), TOKENS)),
    (partial(nn.CrossEntropyLoss, ignore_index=2), (draw(N, C, T), TOKENS)),
    (partial(nn.CrossEntropyLoss, label_smoothing=0.1), (draw(N, C), CLASSES)),
    (partial(nn.CrossEntropyLoss, label_smoothing=0.1, ignore_index=0), (draw(N, C, T), TOKENS)),
    (nn.NLLLoss, (draw(N, C).log_softmax(1), CLASSES)),
    (partial(nn.NLLLoss, ignore_index=1), (draw(N, C, T).log_softmax(1), TOKENS)),
    (nn.MSELoss, REAL),
    (nn.L1Loss, REAL),
    (partial(nn.SmoothL1Loss, beta=0.3), REAL),
    (partial(nn.HuberLoss, delta=0.7), REAL),
    (nn.BCEWithLogitsLoss, LABELS),
    (partial(nn.BCEWithLogitsLoss, pos_weight=WEIGHT, weight=WEIGHT[None]), LABELS),
    (nn.BCELoss, (LABELS[0].sigmoid(), LABELS[1])),
    (nn.KLDivLoss, PROBABILITIES),
    (partial(nn.KLDivLoss, log_target=True), (PROBABILITIES[0], PROBABILITIES[1].log())),
    (nn.PoissonNLLLoss, (draw(N, 2), torch.ones(N, 2))),
    (partial(nn.HingeEmbeddingLoss, margin=0.5), SIGNS),
    (nn.SoftMarginLoss, SIGNS),
]


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides the total loss")  # of KLDivLoss, by torch
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("make", "data"), KINDS)
def test_the_batch_mean_or_sum_is_torchs(make: Any, data: tuple[Tensor, Tensor], reduction: str) -> None:
    """float32 sums of some 50 terms: relative 1e-5."""
    criterion = make(reduction=reduction)
    losses, mask = losses_of(criterion, *data)
    assert losses.dtype == torch.float32
    assert len(losses) == N
    torch.testing.assert_close(reduced(criterion, losses, mask), criterion(*data), rtol=1e-5, atol=1e-7)
    for part in (slice(0, 1), slice(3, 8)):  # each batch, not the whole alone
        few = (data[0][part], data[1][part])
        losses, mask = resolve_loss(criterion).evaluate(Given(), few)
        torch.testing.assert_close(reduced(criterion, losses, mask), criterion(*few), rtol=1e-5, atol=1e-7)


def test_batchmean() -> None:
    losses, _ = losses_of(nn.KLDivLoss(reduction="batchmean"), *PROBABILITIES)
    torch.testing.assert_close(losses.mean(), F.kl_div(*PROBABILITIES, reduction="batchmean"))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
def test_class_weights_multiply_each_samples_loss(reduction: str, smoothing: float) -> None:
    outputs = draw(N, C)
    criterion = nn.CrossEntropyLoss(WEIGHT, reduction=reduction, label_smoothing=smoothing)
    wanted = F.cross_entropy(outputs, CLASSES, WEIGHT, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses_of(criterion, outputs, CLASSES)[0], wanted)
    torch.testing.assert_close(
        losses_of(nn.NLLLoss(WEIGHT), outputs, CLASSES)[0], -outputs[range(N), CLASSES] * WEIGHT[CLASSES]
    )
    tokens, mask = losses_of(nn.CrossEntropyLoss(WEIGHT, ignore_index=3), draw(N, C, T), TOKENS)
    torch.testing.assert_close(tokens, F.cross_entropy(draw(N, C, T), TOKENS, WEIGHT, ignore_index=3, reduction="none"))
    assert torch.equal(mask, TOKENS != 3)


def test_small_losses_keep_their_digits() -> None:
    """1e-6 relative where the loss is 1e-20, which log-softmax in float32 calls 0; labels by log1p(exp)."""
    outputs = torch.tensor([[46.0, 0.0], [0.0, 30.0]])
    targets = torch.tensor([0, 1])
    wanted = torch.log1p(torch.exp(-torch.tensor([46.0, 30.0], dtype=torch.float64)))
    for loss in (nn.CrossEntropyLoss(), F.cross_entropy, nn.CrossEntropyLoss(torch.ones(2))):
        torch.testing.assert_close(losses_of(loss, outputs, targets)[0].double(), wanted, rtol=1e-6, atol=0)
    labels = losses_of(nn.BCEWithLogitsLoss(), outputs[:, :1], torch.tensor([1.0, 1.0]))[0]
    torch.testing.assert_close(labels[:1].double(), wanted[:1], rtol=1e-6, atol=0)


def test_a_single_output_fits_targets_without_a_dimension() -> None:
    outputs, targets = draw(N, 1), (draw(N, seed=1) > 0).float()
    wanted = F.binary_cross_entropy_with_logits(outputs[:, 0], targets, reduction="none")
    torch.testing.assert_close(losses_of(nn.BCEWithLogitsLoss(), outputs, targets)[0], wanted)
    torch.testing.assert_close(losses_of(F.l1_loss, outputs, targets)[0], (outputs[:, 0] - targets).abs())


SAME = [
    (nn.CrossEntropyLoss(), "cross_entropy"),
    (nn.CrossEntropyLoss(reduction="none"), "cross_entropy"),
    (F.cross_entropy, "cross_entropy"),
    (partial(F.cross_entropy, reduction="none"), "cross_entropy"),
    (partial(partial(F.cross_entropy, label_smoothing=0.1), label_smoothing=0.0), "cross_entropy"),
    (nn.MSELoss(), "mse"),
    (F.mse_loss, "mse"),
]


@pytest.mark.parametrize(("loss", "name"), SAME)
def test_criteria_without_options_are_the_named_losses(
    loss: Any, name: str, build: Any, problem: Classification, assert_same_kernel: Any
) -> None:
    assert resolve_loss(loss).name == name
    data = problem.data if name == "cross_entropy" else (problem.inputs, draw(problem.num_samples, 3))
    for backend in ("torch", "auto"):
        found = build(problem.model(), data, loss=loss, backend=backend)
        assert_same_kernel(found, build(problem.model(), data, loss=name, backend=backend))


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        partial(F.cross_entropy, label_smoothing=0.1),
        nn.CrossEntropyLoss(torch.tensor([0.2, 1.0, 3.0]), reduction="none"),
    ],
)
def test_a_kernel_of_a_criterion_is_that_of_the_callable(loss: Any, build: Any, problem: Classification) -> None:
    options = (
        loss.keywords if isinstance(loss, partial) else {"weight": loss.weight, "label_smoothing": loss.label_smoothing}
    )

    def own(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none", **options)

    before = None if "weight" not in options or options["weight"] is None else options["weight"].clone()
    found, wanted = (build(problem.model(), problem.data, loss=each) for each in (loss, own))
    np.testing.assert_allclose(found.to_numpy(), wanted.to_numpy(), rtol=2e-4, atol=2e-5 * float(wanted.variance.max()))
    assert before is None or torch.equal(options["weight"], before)


class Sequence(nn.Module):
    """Logits of torch's convention for sequences, [B, C, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_sequences_are_losses_per_token(build: Any, backend: str) -> None:
    inputs, targets = draw(8, 2, T), torch.arange(8 * T).reshape(8, T) % 3
    targets[0, :2] = -100

    def own(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none"), batch[1] != -100

    model = Sequence()
    found = build(model, (inputs, targets), loss=nn.CrossEntropyLoss(), backend=backend)
    wanted = build(model, (inputs, targets), loss=own, backend=backend)
    assert found.num_samples == 8 * T - 2
    assert torch.equal(found.tokens, wanted.tokens)
    assert resolve_loss(nn.CrossEntropyLoss()).over_tokens(30, 8, T).name != "cross_entropy"
    np.testing.assert_allclose(found.to_numpy(), wanted.to_numpy(), rtol=2e-4, atol=2e-5 * float(wanted.variance.max()))
    lossk.build_kernel(model, (inputs, targets), loss=nn.CrossEntropyLoss(), sampler=lossk.Laplace(localization=5.0),
                       num_chains=2, num_draws=3, tile=16, progress=False)  # fmt: skip


NAMES = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.CrossEntropyLoss(label_smoothing=0.2),
    nn.CrossEntropyLoss(ignore_index=0),
    nn.CrossEntropyLoss(WEIGHT),
    nn.CrossEntropyLoss(WEIGHT + 1e-6),
    nn.CrossEntropyLoss(torch.arange(20.0)),
    nn.CrossEntropyLoss(torch.arange(20.0) + 1),
    nn.NLLLoss(),
    nn.MSELoss(),
    nn.MSELoss(reduction="sum"),
    nn.HuberLoss(),
    nn.HuberLoss(delta=2.0),
    nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
    nn.BCEWithLogitsLoss(weight=WEIGHT),
]


def test_other_options_are_another_name() -> None:
    names = [resolve_loss(loss).name for loss in NAMES]
    assert len(set(names)) == len(names)
    assert names[1] == "cross_entropy(label_smoothing=0.1)"
    assert resolve_loss(partial(F.cross_entropy, label_smoothing=0.1)).name == names[1]

    def own(model: nn.Module, batch: Any, *, power: float, scale: Tensor, how: Any) -> Tensor:
        return model(batch)

    many = [partial(own, power=p, scale=s, how=F.relu) for p in (1.0, 2.0) for s in (torch.ones(20), torch.zeros(20))]
    names = [resolve_loss(loss).name for loss in many]
    assert len(set(names)) == 4
    assert not any("0x" in name for name in names)


def test_a_resume_with_other_options_is_refused(problem: Classification, tmp_path: Any, build: Any) -> None:
    path = tmp_path / "k.lossk"
    build(problem.model(), problem.data, out=path, loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    with pytest.raises(lossk.StoreError, match=r"label_smoothing=0\.1.*label_smoothing=0\.2"):
        build(problem.model(), problem.data, out=path, resume=True, loss=nn.CrossEntropyLoss(label_smoothing=0.2))


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (nn.CrossEntropyLoss, TypeError, r"instance, loss=CrossEntropyLoss\(\.\.\.\)"),
    (nn.GaussianNLLLoss(), TypeError, "GaussianNLLLoss has no loss per sample.*lambda model, batch"),
    (F.gaussian_nll_loss, TypeError, "gaussian_nll_loss.*lambda model, batch"),
    (nn.CTCLoss(), TypeError, "CTCLoss.*lambda model, batch"),
    (nn.TripletMarginLoss(), TypeError, "TripletMarginLoss.*lambda model, batch"),
    (nn.Linear(2, 2), TypeError, "Linear.*lambda model, batch"),
    (F.softmax, TypeError, "softmax.*lambda model, batch"),
    (partial(F.cross_entropy, size_average=False), ValueError, "label_smoothing, reduction, got size_average"),
    (partial(F.mse_loss, weight=WEIGHT), ValueError, "mse is understood with reduction, got weight"),
    (partial(F.mse_loss, reduction="total"), ValueError, "reduction must be 'mean', 'sum' or 'none', got 'total'"),
    (nn.CrossEntropyLoss(torch.tensor([1.0, float("nan")])), ValueError, "weight must hold finite"),
    (lambda model: None, TypeError, r"loss must take \(model, batch\).*lambda model, batch"),
    (lambda model, inputs, targets: None, TypeError, r"loss must take \(model, batch\).*lambda model, batch"),
    (torch.compile, TypeError, r"loss must take \(model, batch\)"),
]


@pytest.mark.parametrize(("loss", "error", "message"), REFUSED)
def test_what_has_no_loss_per_sample_is_refused_by_name(loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve_loss(loss)


class Criterion(nn.Module):
    """What people write for themselves."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return prediction.square().sum(dim=1) + target


@pytest.mark.parametrize(
    "loss", [Criterion(), lambda logits, labels: F.cross_entropy(logits, labels, reduction="none")]
)
def test_a_criterion_of_ones_own_is_told_how_a_loss_is_called(loss: Any, problem: Classification, build: Any) -> None:
    with pytest.raises(TypeError, match=r"called with \(model, batch\) and raised.*lambda model, batch"):
        build(problem.model(), problem.data, loss=loss)


def test_a_mistake_within_a_loss_is_shown_as_it_is(problem: Classification, build: Any) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).sum(dim=1) + None

    with pytest.raises(TypeError, match="unsupported operand"):
        build(problem.model(), problem.data, loss=loss)


BAD_DATA = [
    (nn.CrossEntropyLoss(), draw(N, C), CLASSES.float(), "targets must be class indices"),
    (nn.CrossEntropyLoss(), draw(N, C), draw(N, C).softmax(1), "targets must be class indices.*lambda model, batch"),
    (nn.CrossEntropyLoss(ignore_index=2), draw(N, C), CLASSES, "sample 2 has ignore_index, 2"),
    (nn.CrossEntropyLoss(), draw(N, T, C), TOKENS, "token_cross_entropy"),
    (nn.CrossEntropyLoss(), draw(N, C, 2, 2), CLASSES, r"shape \[B, C\], got \[13, 5, 2, 2\]"),
    (nn.CrossEntropyLoss(), draw(N, 3), CLASSES, r"\[0, 3\), the model's classes; sample 3 has 3"),
    (nn.CrossEntropyLoss(WEIGHT[:4]), draw(N, C), CLASSES, r"weight must have shape \[5\].*got \[4\]"),
    (nn.BCEWithLogitsLoss(), draw(N, C), draw(N, 2), r"outputs \[5\] and targets \[2\]"),
    (nn.BCEWithLogitsLoss(weight=torch.ones(N, 1)), *LABELS, r"weight must fit the entries of a single sample, \[5\]"),
]


@pytest.mark.parametrize(("loss", "outputs", "targets", "message"), BAD_DATA)
def test_data_that_do_not_fit_are_refused(loss: Any, outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses_of(loss, outputs, targets)


def test_criteria_in_other_places_that_take_a_loss(problem: Classification) -> None:
    from lossk.analysis.baselines import gradient_norms

    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    norms = gradient_norms(problem.model(), problem.data, loss=loss)
    wanted = gradient_norms(
        problem.model(),
        problem.data,
        loss=lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.1, reduction="none"),
    )
    torch.testing.assert_close(norms, wanted, rtol=1e-4, atol=1e-6)
    traces = lossk.sample_losses(
        problem.model(), problem.data, loss=loss, sampler=sgld(), num_chains=2, num_draws=3, progress=False
    )
    assert traces.losses.shape == (2, 3, problem.num_samples)
