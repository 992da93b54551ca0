"""Several probe sets in one run: their rows, one after the other, are those of one kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lossk

Build = Callable[..., lossk.LossKernel]
Same = Callable[[lossk.LossKernel, lossk.LossKernel], None]
Data = tuple[Tensor, Tensor]


def halves(problem: Any) -> tuple[Data, Data]:
    inputs, targets = problem.data
    return (inputs[:8], targets[:8]), (inputs[8:], targets[8:])


# --- the same numbers --------------------------------------------------------------------------------------------


def test_sets_are_their_concatenation(build: Build, problem: Any, assert_same_kernel: Same) -> None:
    """Bitwise: the first set is a whole number of probe batches, so the passes are the same ones."""
    whole = lossk.Passes().probe_batch
    a = torch.randn(whole, 4), torch.arange(whole) % 3
    b = problem.data
    joined = build(problem.model(), tuple(torch.cat(pair) for pair in zip(a, b, strict=True)), train=b)
    kernel = build(problem.model(), lossk.ProbeSets(a=a, b=DataLoader(TensorDataset(*b), batch_size=5)), train=b)
    assert kernel.sets == {"a": slice(0, 256), "b": slice(256, 277)}
    assert joined.sets == {}
    assert "sets a, b" in repr(kernel)
    assert_same_kernel(kernel, joined)
    np.testing.assert_array_equal(
        kernel[kernel.sets["b"], kernel.sets["a"]], kernel.to_numpy()[kernel.sets["b"], kernel.sets["a"]]
    )
    v = torch.arange(277.0)
    assert torch.equal(kernel.matvec(v), joined.matvec(v))


def test_ragged_sets_and_traces(problem: Any, sgld: Any) -> None:
    """Sets of 8 and 13 and one of a single sample, in any order: the same losses up to the passes' rounding."""
    a, b = halves(problem)
    settings: dict[str, Any] = {"sampler": sgld(), "num_chains": 2, "num_draws": 5, "progress": False}
    joined = lossk.sample_losses(problem.model(), problem.data, train=problem.data, **settings)
    one = tuple(t[20:] for t in problem.data)
    traces = lossk.sample_losses(problem.model(), lossk.ProbeSets(b=b, a=a, one=one), train=problem.data, **settings)
    assert list(traces.sets) == ["b", "a", "one"]
    for name, rows in (("a", slice(0, 8)), ("b", slice(8, 21)), ("one", slice(20, 21))):
        np.testing.assert_allclose(traces.losses[..., traces.sets[name]], joined.losses[..., rows], rtol=1e-5)
    kernel = lossk.LossKernel.from_traces(traces)
    assert kernel.sets == traces.sets
    block = kernel[kernel.sets["one"], kernel.sets["b"]]
    np.testing.assert_allclose(block, kernel.to_numpy()[21:22, :13], rtol=1e-6)


def test_the_training_data_are_those_given(build: Build, problem: Any) -> None:
    """L_n is over `train` alone, whatever the sets; given as one of them it is read once."""
    a, b = halves(problem)
    alone = build(problem.model(), b, train=a)
    both = build(problem.model(), lossk.ProbeSets(a=a, b=b), train=a)
    np.testing.assert_allclose(both[both.sets["b"], both.sets["b"]], alone.to_numpy(), rtol=1e-3, atol=1e-9)
    other = build(problem.model(), lossk.ProbeSets(a=a, b=b), train=b)
    assert not np.allclose(other.to_numpy(), both.to_numpy(), rtol=1e-2)
    assert both.meta["config"]["num_train"] == 8
    assert both.diagnostics.waic is None  # type: ignore[union-attr]  # the probe is more than the training set


class Counting(Dataset[Any]):
    def __init__(self, data: Data) -> None:
        self.data, self.reads = data, 0

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.reads += 1
        return self.data[0][i], int(self.data[1][i])


def test_what_is_given_twice_is_read_once(build: Build, problem: Any) -> None:
    data = Counting(problem.data)
    kernel = build(problem.model(), lossk.ProbeSets(first=data, again=data), train=data)
    assert data.reads == 21
    np.testing.assert_array_equal(kernel.correlation(slice(0, 21), slice(0, 21)), kernel.correlation()[:21, :21])
    twins = np.diag(kernel.correlation(kernel.sets["first"], kernel.sets["again"]))
    np.testing.assert_allclose(twins, 1.0, atol=1e-5)


def test_a_stream_and_an_augmented_set(build: Build, problem: Any) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return zip(problem.inputs, problem.targets.tolist(), strict=True)

    kernel = build(problem.model(), lossk.ProbeSets(stream=Stream(), plain=problem.data), train=problem.data)
    np.testing.assert_allclose(kernel.mean_loss[:21], kernel.mean_loss[21:], rtol=1e-6)


# --- different things side by side -------------------------------------------------------------------------------


def test_sets_of_different_shapes(build: Build) -> None:
    """Images of two sizes under a network that pools."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    small = torch.randn(7, 1, 6, 6), torch.arange(7) % 3
    large = torch.randn(5, 1, 9, 11), torch.arange(5) % 3
    kernel = build(model, lossk.ProbeSets(small=small, large=large), train=small)
    for name, data in (("small", small), ("large", large)):
        alone = build(model, data, train=small)
        np.testing.assert_allclose(kernel.mean_loss[kernel.sets[name]], alone.mean_loss, rtol=1e-6)
        block = kernel[kernel.sets[name], kernel.sets[name]]
        np.testing.assert_allclose(block, alone.to_numpy(), rtol=1e-4, atol=1e-6 * float(alone.variance.max()))


def test_predicted_labels_beside_true_ones(build: Build, problem: Any) -> None:
    """The same inputs under two targets: rows agree exactly where the model is right, and only there."""
    model = problem.model()
    predicted = lossk.predicted_labels(model, problem.data)
    right = predicted[1] == problem.targets
    assert 0 < int(right.sum()) < 21
    kernel = build(model, lossk.ProbeSets(true=problem.data, predicted=predicted), train=problem.data)
    true, guessed = (kernel.mean_loss[kernel.sets[name]] for name in ("true", "predicted"))
    np.testing.assert_array_equal(true[right], guessed[right])
    assert bool((guessed[~right] != true[~right]).all())
    assert float(guessed[~right].mean()) < float(true[~right].mean()), "its own answers are what the model finds likely"
    own = np.diag(kernel.correlation(kernel.sets["true"], kernel.sets["predicted"]))
    np.testing.assert_allclose(own[right.numpy()], 1.0, atol=1e-5)
    assert own[~right.numpy()].max() < 0.999


def test_tokens_of_several_sets(build: Build, tmp_path: Path) -> None:
    """Two lengths of text; tokens are numbered within their own set."""
    model = nn.Sequential(nn.Embedding(5, 6), nn.Tanh(), nn.Linear(6, 5))
    targets = torch.tensor([[1, 2, -100], [-100, -100, -100], [3, -100, 0], [4, -100, -100]])
    long = torch.randint(0, 5, (4, 3)), targets
    short = torch.randint(0, 5, (2, 1)), torch.tensor([[2], [1]])
    kernel = build(
        model,
        lossk.ProbeSets(long=long, short=short),
        train=long,
        loss="token_cross_entropy",
        out=tmp_path / "k.lossk",
    )
    expected = torch.tensor([[0, 0], [0, 1], [2, 0], [2, 2], [3, 0], [0, 0], [1, 0]])
    opened = lossk.open(tmp_path / "k.lossk")
    for each in (kernel, opened):
        assert torch.equal(each.tokens, expected)  # type: ignore[arg-type]
        assert each.sets == {"long": slice(0, 5), "short": slice(5, 7)}
    alone = build(model, long, train=long, loss="token_cross_entropy")
    np.testing.assert_allclose(kernel.mean_loss[:5], alone.mean_loss, rtol=1e-6)
    assert kernel.meta["config"]["num_train"] == 5


# --- kept on disk ------------------------------------------------------------------------------------------------


def test_sets_are_kept(build: Build, problem: Any, assert_same_kernel: Same, fail_at: Any, tmp_path: Path) -> None:
    """Saved and opened, written by a run, and killed and resumed to the bitwise same result."""
    a, b = halves(problem)
    sets = lossk.ProbeSets(a=a, b=b)
    reference = build(problem.model(), sets, train=a, loss=fail_at())
    reference.save(tmp_path / "saved.lossk")
    out = tmp_path / "resumed.lossk"
    with pytest.raises(RuntimeError, match="stopped by the test"):
        build(problem.model(), sets, train=a, loss=fail_at(115), out=out)
    assert 0 < len((out / "commits.jsonl").read_text().splitlines()) < 4
    with pytest.raises(lossk.StoreError, match="holds another run"):
        build(problem.model(), lossk.ProbeSets(a=a, c=b), train=a, loss=fail_at(), out=out, resume=True)
    with pytest.raises(lossk.StoreError, match="holds another run"):
        build(problem.model(), problem.data, train=a, loss=fail_at(), out=out, resume=True)
    resumed = build(problem.model(), sets, train=a, loss=fail_at(), out=out, resume=True)
    again = build(problem.model(), sets, train=a, loss=fail_at(), out=out, resume=True)  # already complete
    for kernel in (resumed, again, lossk.open(out), lossk.open(tmp_path / "saved.lossk")):
        assert kernel.sets == {"a": slice(0, 8), "b": slice(8, 21)}
        assert_same_kernel(kernel, reference)


# --- refused -----------------------------------------------------------------------------------------------------


def test_bad_sets(problem: Any) -> None:
    with pytest.raises(ValueError, match=r"at least one set.*got none"):
        lossk.ProbeSets()
    with pytest.raises(ValueError, match="must have a name"):
        lossk.ProbeSets(**{"": problem.data})
    with pytest.raises(TypeError, match="multiple values for keyword argument 'a'"):
        lossk.ProbeSets(a=problem.data, **dict(a=problem.data))  # noqa: C408 - what a clash looks like
    with pytest.raises(TypeError, match=r"test must be a DataLoader.*NoneType"):
        lossk.ProbeSets(test=None)
    with pytest.raises(TypeError, match=r"inner must be a DataLoader.*ProbeSets"):
        lossk.ProbeSets(inner=lossk.ProbeSets(a=problem.data))


@pytest.mark.parametrize("name", ["self", "train", "sets", "not an identifier"])
def test_any_name_will_do(build: Build, problem: Any, name: str) -> None:
    data = problem.data
    kernel = build(problem.model(), lossk.ProbeSets(**{name: data}), train=data)
    assert kernel.sets == {name: slice(0, 21)}
    assert kernel.diagnostics.waic is not None  # type: ignore[union-attr]  # the training set, and nothing else


@pytest.mark.parametrize("call", ["build", "sample_losses"])
def test_train_must_be_given(build: Build, problem: Any, call: str) -> None:
    sets = lossk.ProbeSets(a=problem.data)
    with pytest.raises(ValueError, match="train must be given with ProbeSets"):
        build(problem.model(), sets) if call == "build" else lossk.sample_losses(problem.model(), sets)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (5, TypeError, "loader set 'b' must be a DataLoader.*int"),
        ((torch.zeros(0, 4), torch.zeros(0).long()), ValueError, "loader set 'b' must hold at least one sample"),
        ((torch.full((3, 4), torch.nan), torch.zeros(3).long()), ValueError, "loader set 'b' must hold finite"),
        ((torch.zeros(3, 4), torch.zeros(2).long()), ValueError, r"loader set 'b'.*\[2, 3\]"),
        ((torch.zeros(3, 4), torch.tensor([0, 1, 9])), ValueError, r"targets must lie in \[0, 3\).*9"),
        ((torch.zeros(3, 5), torch.zeros(3).long()), RuntimeError, "shapes"),
    ],
    ids=["a number", "empty", "NaN", "lengths", "labels", "another width"],
)
def test_a_bad_set_is_named(
    build: Build, problem: Any, data: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        build(problem.model(), lossk.ProbeSets(a=problem.data, b=data), train=problem.data, out=tmp_path / "k.lossk")
    assert not (tmp_path / "k.lossk").exists()


def test_sets_are_no_training_data(build: Build, problem: Any) -> None:
    with pytest.raises(TypeError, match=r"train must be a DataLoader.*ProbeSets"):
        build(problem.model(), problem.data, train=lossk.ProbeSets(a=problem.data))


def test_one_row_in_all_is_too_few(build: Build, problem: Any) -> None:
    one = tuple(t[:1] for t in problem.data)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        build(problem.model(), lossk.ProbeSets(a=one), train=problem.data)


def test_a_row_that_diverges_is_named_by_its_set(build: Build, problem: Any) -> None:
    """A loss that is infinite away from w*, for one sample of the second set only."""
    model = problem.model()
    bias = model[2].bias.detach().clone()

    def loss(model: nn.Module, batch: Data) -> Tensor:
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses if torch.equal(model[2].bias, bias) else torch.where(batch[0][:, 0] == 77, torch.inf, losses)  # type: ignore[index,union-attr]

    a, b = halves(problem)
    b[0][4, 0] = 77
    with pytest.raises(lossk.DivergedError, match="probe set 'b' sample 4 has loss inf"):
        build(model, lossk.ProbeSets(a=a, b=b), train=a, loss=loss)


def test_traces_check_their_sets() -> None:
    losses = np.random.default_rng(0).random((2, 3, 4), np.float32)
    for wrong in (slice(0, 5), slice(2, 2), slice(-1, 3), slice(0, 4, 2), [0, 1], slice(None)):
        with pytest.raises(ValueError, match="sets: 'a' must be a slice of the 4 columns"):
            lossk.LossTraces(losses, sets={"a": wrong})  # type: ignore[dict-item]
