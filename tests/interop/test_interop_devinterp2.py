"""devinterp 2's tree, influence function and sample(), without devinterp: its conventions are written out here."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lossk
from file_events import Event, watched
from lossk.interop import devinterp
from lossk.interop.devinterp2_loss import next_token_losses

xr = pytest.importorskip("xarray")

VOCABULARY, LENGTH = 7, 6  # tokens; sequences of LENGTH predict LENGTH - 1
EPSILON = float(np.finfo(np.float32).eps)


class TinyLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 5)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(5, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.embed(tokens))))


class Sequences(torch.utils.data.Dataset):
    def __init__(self, count: int, seed: int) -> None:
        self.ids = torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}


TRAIN, OTHER = Sequences(48, 0), Sequences(30, 1)
SETTINGS: dict[str, Any] = {"lr": 1e-3, "n_beta": 20.0, "localization": 5.0, "num_chains": 2, "num_draws": 8}
SETTINGS |= {"batch_size": 8, "num_burnin_steps": 3, "num_steps_bw_draws": 2, "init_seed": 1}
OBSERVABLES = {"the-other": OTHER, "train": (TRAIN, 4)}


def sample(model: nn.Module, **changes: Any) -> Any:
    return devinterp.sample(model, TRAIN, OBSERVABLES, **(SETTINGS | changes))


@pytest.fixture(scope="module")
def tree() -> Any:
    torch.manual_seed(3)
    return sample(TinyLM())


def random_tree(losses: np.ndarray, **attrs: Any) -> Any:
    """A tree of one observable "a", from losses [chain, draw, batch, token_pos]."""
    ids = np.arange(losses.shape[2] * (losses.shape[3] + 1)).reshape(losses.shape[2], -1)
    variables = {
        "loss_a": (("chain", "draw", "batch_a", "token_pos"), losses),
        "input_ids_a": (("batch_a", "token"), ids),
    }
    return xr.DataTree(xr.Dataset(variables, attrs=attrs))


def moments(losses: np.ndarray, *, covariance: bool) -> np.ndarray:
    """[rows, rows] float64 of losses [draws, rows]: pooled, ddof 1; NaN where a variance is zero."""
    deviations = losses - losses.mean(axis=0)
    matrix = deviations.T @ deviations / (len(losses) - 1)
    if covariance:
        return matrix
    scale = np.sqrt(np.diag(matrix))
    with np.errstate(invalid="ignore", divide="ignore"):
        return matrix / np.outer(scale, scale)


@pytest.mark.parametrize("reduction", ["stack", "mean"])
@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("method", ["sequence", "token", "average"])
def test_bif_is_the_pooled_moment_matrix(method: str, covariance: bool, reduction: str) -> None:
    generator = np.random.default_rng(0)
    losses = (2.0 + generator.normal(size=(3, 5, 7, 4)) * generator.uniform(0.1, 3, size=(7, 4))).astype(np.float32)
    found = devinterp.compute_bif(
        random_tree(losses),
        correlation_method="sequence" if method == "sequence" else "token",
        average_tokenwise_bif=method == "average",
        compute_covariance=covariance,
        reduce_chain_dimension_method=reduction,
        batch_index_range_1=[5, 0, 2],
    )
    wide = losses.astype(np.float64)
    wide = wide.mean(axis=0, keepdims=True) if reduction == "mean" else wide
    rows = wide.mean(axis=3) if method == "sequence" else wide
    matrix = moments(rows.reshape(rows.shape[0] * rows.shape[1], -1), covariance=covariance)
    if method != "sequence":
        matrix = matrix.reshape(7, 4, 7, 4).transpose(0, 2, 1, 3)
    if method == "average":
        matrix = matrix.mean(axis=(2, 3))
    expected = matrix[[5, 0, 2]]
    # Rounding of float32 losses of size 10 at most (theirs rounds them so), of products of 15 draws, of the result.
    assert np.abs(found["influences"].values - expected).max() <= 40 * EPSILON * max(1.0, np.abs(expected).max())
    dims = ("batch_1", "batch_2") + (("target_position", "target_position_T") if method == "token" else ())
    assert found["influences"].dims == dims
    assert found["influences"].dtype == np.float32
    assert found["batch_1"].values.tolist() == [5, 0, 2]
    assert found["input_ids"].dims == ("batch", "position")


def test_a_loss_that_never_varies_has_no_correlation() -> None:
    losses = np.random.default_rng(0).normal(size=(2, 50, 4, 1)).astype(np.float32)
    losses[:, :, 2] = 0.1  # whose float32 mean need not be 0.1
    tree = random_tree(losses)
    correlation = devinterp.compute_bif(tree, correlation_method="sequence")["influences"].values
    assert np.isnan(correlation[2]).all()
    assert np.isnan(correlation[:, 2]).all()
    assert np.isfinite(np.delete(np.delete(correlation, 2, 0), 2, 1)).all()
    covariance = devinterp.compute_bif(tree, correlation_method="sequence", compute_covariance=True)[
        "influences"
    ].values
    assert (covariance[2] == 0).all()


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = random_tree(np.random.default_rng(1).normal(size=(2, 6, 11, 3)).astype(np.float32))
    whole = devinterp.compute_bif(tree)
    monkeypatch.setattr("lossk.interop.devinterp2_bif.STRIPE", 7)
    assert np.abs((devinterp.compute_bif(tree) - whole)["influences"].values).max() <= 8 * EPSILON


def test_a_failed_chain_is_refused_by_number() -> None:
    losses = np.ones((3, 6, 2, 1), dtype=np.float32)
    losses[1, 4:] = np.nan
    with pytest.raises(ValueError, match=r"loss_a must be finite; chain 1 is not from draw 4 on.*chain=\[0, 2\]"):
        devinterp.read_traces(random_tree(losses))
    with pytest.raises(ValueError, match="chain 1"):
        devinterp.compute_bif(random_tree(losses))


def test_bad_trees_are_refused(tmp_path: Path) -> None:
    tree = random_tree(np.ones((1, 2, 2, 1), dtype=np.float32))
    with pytest.raises(KeyError, match="observables of"):
        devinterp.compute_bif(tree, loss_keys=["b"])
    with pytest.raises(KeyError, match="loss_NAME"):
        devinterp.read_traces(xr.DataTree())
    with pytest.raises(FileNotFoundError, match="Zarr store"):
        devinterp.read_traces(tmp_path / "nothing")
    with pytest.raises(TypeError, match="DataTree"):
        devinterp.read_traces(3)
    with pytest.raises(ValueError, match="correlation_method"):
        devinterp.compute_bif(tree, correlation_method="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have dimensions"):
        devinterp.read_traces(xr.DataTree(tree.to_dataset().transpose()))


def test_sample_returns_their_tree(tree: Any) -> None:
    dataset, steps = tree.dataset, 3 + 8 * 2
    shapes = {name: tuple(dataset[name].sizes.items()) for name in dataset.data_vars}
    loss = (("chain", 2), ("draw", 8))
    assert shapes["loss_the_other"] == (*loss, ("batch_the_other", 24), ("token_pos", 5))
    assert shapes["loss_train"] == (*loss, ("batch_train", 32), ("token_pos", 5))
    assert shapes["sampling_loss"] == (*loss, ("batch", 8), ("token_pos", 5))
    assert shapes["sampling_loss_micro"] == (("chain", 2), ("step", steps), ("batch_sampling", 8), ("token_pos", 5))
    assert shapes["init_loss"] == (("chain", 2), ("token_pos", 5))
    assert np.isfinite(dataset["sampling_loss_micro"].values).all()
    assert tree.attrs["metadata"]["config"]["sampler"]["n_beta"] == 20.0
    chosen = random.Random(1337).sample(range(48), 32)  # as devinterp chooses an observable's sequences
    assert np.array_equal(dataset["input_ids_train"].values, TRAIN.ids[chosen].numpy())


def test_sample_is_the_chain_that_build_kernel_runs() -> None:
    """No draws but through lossk.SGLD: the same losses as sample_losses with the same settings."""
    torch.manual_seed(3)
    model = TinyLM()
    dataset = sample(model, match_sampling_input_ids_across_chains=False).dataset
    sampler = lossk.SGLD(lr=1e-3, n_beta=20.0, localization=5.0, batch_size=8, num_burnin_steps=3, num_steps_bw_draws=2)
    probe = torch.from_numpy(dataset["input_ids_train"].values)
    traces = lossk.sample_losses(
        model,
        (probe[:, :-1], probe[:, 1:]),
        train=(TRAIN.ids[:, :-1], TRAIN.ids[:, 1:]),
        loss="token_cross_entropy",
        sampler=sampler,
        num_chains=2,
        num_draws=8,
        passes=lossk.Passes(),
        seed=1,
        progress=False,
    )
    found = torch.from_numpy(dataset["loss_train"].values).flatten(2)
    torch.testing.assert_close(found, traces.losses, rtol=1e-4, atol=1e-5)


def test_sample_gives_the_model_back() -> None:
    model = TinyLM().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sample(model, num_draws=2)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_masks_hold_weights_and_boxes_bound_them() -> None:
    model = TinyLM()
    seen: list[tuple[Tensor, Tensor]] = []

    def loss_fn(network: nn.Module, ids: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # of the steps: the checks before them move every weight a little, and back
            seen.append((network.embed.weight.detach().clone(), network.head.weight.detach().clone()))
        return nn.functional.cross_entropy(network(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")

    mask = torch.zeros(VOCABULARY, 5)
    mask[2:4] = 1
    masks = {"embed.weight": mask, "head.weight": None}
    sample(model, param_masks=masks, bounding_box_size=0.05, init_noise=0.01, loss_fn=loss_fn, localization=0.0)
    embed, head = (torch.stack([pair[i] for pair in seen]) for i in (0, 1))
    held = mask == 0
    assert torch.equal(embed[:, held], model.embed.weight.detach()[held].expand(len(seen), -1))
    assert (embed[-1] != model.embed.weight)[mask == 1].all()
    away = (head - model.head.weight.detach()).abs().amax()
    assert 0.0499 < float(away) <= 0.05 + 1e-7


def test_decay_and_noise_level_are_the_law_they_say() -> None:
    """Without data a weight is Gaussian: mean pull w* / (pull + decay), variance sigma^2 / (pull + decay)."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4000,), 2.0))

        def forward(self, ids: Tensor) -> Tensor:
            return torch.zeros(*ids.shape, VOCABULARY) + 0.0 * self.weight.sum()

    last: list[Tensor] = []

    def loss_fn(network: nn.Module, ids: Tensor) -> Tensor:
        last[:] = [network.weight.detach().clone()]
        return network(ids)[:, 1:].sum(dim=2)

    changes = {"localization": 30.0, "llc_weight_decay": 10.0, "noise_level": 0.5, "lr": 0.01, "num_chains": 1}
    sample(Flat(), loss_fn=loss_fn, num_draws=60, **changes)
    mean, variance = 1.5, 0.25 / 40.0 / (1 - 0.01 * 40.0 / 4)  # Euler's step adds lr a / 4 to the variance
    assert abs(float(last[0].mean()) - mean) < 5 * (variance / 4000) ** 0.5
    assert abs(float(last[0].var()) / variance - 1) < 5 * (2 / 4000) ** 0.5


def test_traces_and_their_excess(tree: Any) -> None:
    traces = devinterp.read_traces(tree)
    assert traces.sets == {"the_other": slice(0, 24), "train": slice(24, 56)}
    assert traces.n_beta == 20.0
    micro = tree.dataset["sampling_loss_micro"].values.astype(np.float64).mean(axis=(2, 3))[:, 3:]
    excess = micro.reshape(2, 8, 2).mean(axis=2) - tree.dataset["init_loss"].values.astype(np.float64).mean()
    assert np.allclose(traces.excess, excess, rtol=0, atol=1e-12)
    per_token = devinterp.read_traces(tree, loss_keys=["train"], per_token=True)
    assert per_token.tokens is not None
    assert per_token.tokens[:7].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [1, 0], [1, 1]]
    assert np.array_equal(per_token.losses.reshape(2, 8, 32, 5), tree.dataset["loss_train"].values)
    kernel = lossk.LossKernel.from_traces(per_token, centering="pooled")
    influence = devinterp.compute_bif(tree, loss_keys=["train"], compute_covariance=True)["influences"].values
    block = influence.transpose(0, 2, 1, 3).reshape(160, 160)
    assert np.abs(kernel.to_numpy() - block).max() <= 8 * EPSILON * np.abs(block).max()


def test_traces_exported_and_read_back() -> None:
    losses = torch.rand(2, 5, 12)
    tokens = torch.stack([torch.arange(12) // 3, torch.arange(12) % 3], dim=1)
    excess = torch.rand(2, 5, dtype=torch.float64)
    traces = lossk.LossTraces(losses, tokens=tokens, excess=excess, n_beta=7.0)
    tree = devinterp.to_datatree(traces, name="a-b", init_loss=1.5)
    assert tree.dataset["loss_a_b"].dims == ("chain", "draw", "batch_a_b", "token_pos")
    back = devinterp.read_traces(tree, per_token=True)
    assert torch.equal(back.losses, losses)
    assert torch.equal(back.tokens, tokens)
    assert back.n_beta == 7.0
    assert np.allclose(back.excess, excess, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="leave tokens out"):
        devinterp.to_datatree(lossk.LossTraces(losses[:, :, :11], tokens=tokens[:11]))
    with pytest.raises(ValueError, match="input_ids must be integers"):
        devinterp.to_datatree(traces, input_ids=np.zeros((4, 3), dtype=int))


def test_samples_become_one_token_each() -> None:
    traces = lossk.LossTraces(torch.rand(2, 4, 6), sets={"left": slice(0, 2), "right": slice(2, 6)})
    dataset = devinterp.to_datatree(traces).dataset
    assert dataset["loss_right"].shape == (2, 4, 4, 1)
    assert dataset["input_ids_right"].values.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]]
    assert "sampling_loss_micro" not in dataset


def test_a_store_is_written_whole_and_opened_again(tmp_path: Path) -> None:
    model, path = TinyLM(), tmp_path / "samples.zarr"
    first = sample(model, output_path=path)
    again = sample(model, output_path=path, n_beta=20.0)
    xr.testing.assert_identical(first.dataset.load(), again.dataset.load())
    assert devinterp.read_traces(path).num_draws == 8
    with pytest.raises(FileExistsError, match=r"lr: 0\.001 there, 0\.002 asked for"):
        sample(model, output_path=path, lr=2e-3)
    with pytest.raises(FileExistsError, match=r"losses of .* at the trained weights: .* the loss or the model"):
        sample(model, output_path=path, loss_fn=lambda net, ids: 1.01 * next_token_losses(net, ids))
    (tmp_path / "other").mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        sample(model, output_path=tmp_path / "other")


def test_a_store_is_durable_before_it_has_its_name(tmp_path: Path) -> None:
    """Cut off before the move nothing has the name; the next call clears away what was left."""
    path, synced, durable, stop = tmp_path / "samples.zarr", set(), [], True

    def before(event: Event) -> None:
        if event.name == "fsync":
            synced.add(event.path)
        if event.other == path:
            durable.append(synced >= {event.path, *event.path.rglob("*")})
            if stop:
                raise KeyboardInterrupt

    with watched(tmp_path, before), pytest.raises(KeyboardInterrupt):
        sample(TinyLM(), output_path=path)
    (tmp_path / f".{path.name}.1.part").mkdir()
    assert not path.exists()
    stop = False
    with watched(tmp_path, before):
        sample(TinyLM(), output_path=path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.zarr"]
    assert durable == [True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr must be finite and greater than 0"),
        ({"noise_level": 0.0}, "noise_level must be"),
        ({"save_metrics": True}, "save_metrics must be one of"),
        ({"rmsprop_eps": 0.1}, "sampling_method_kwargs of 'sgmcmc_sgld'"),
        ({"gradient_accumulation_steps": 8}, "at most the samples of the dataset"),
        ({"param_masks": {"nothing": None}}, "no 'nothing'"),
        ({"param_masks": {"head.bias": torch.full((VOCABULARY,), 0.5)}}, "0 and 1 only"),
        ({"batches_per_draw": 4}, "must hold batches per draw"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(TinyLM(), **changes)


def test_a_diverging_chain_raises() -> None:
    with pytest.raises(lossk.DivergedError, match="devinterp would go on"):
        sample(TinyLM(), lr=1e6, num_draws=20)


def test_bif_samples_and_computes() -> None:
    model = TinyLM()
    found = devinterp.bif(model, TRAIN, {"train": (TRAIN, 1)}, correlation_method="sequence", **SETTINGS)
    tree = devinterp.sample(model, TRAIN, {"train": (TRAIN, 1)}, **SETTINGS)
    expected = devinterp.compute_bif(tree, correlation_method="sequence")
    xr.testing.assert_identical(found, expected)


def test_rmsprop_runs_with_settings_of_its_own() -> None:
    plain = sample(TinyLM(), sampling_method="rmsprop_sgld", rmsprop_alpha=0.9, rmsprop_eps=1.0)
    assert plain.attrs["metadata"]["config"]["sampler"]["sampling_method_kwargs"] == {"eps": 1.0, "alpha": 0.9}
