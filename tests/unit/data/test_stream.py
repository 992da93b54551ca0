"""Data that are read again at every pass: the kernel of resident data, and batches that no tensor could hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lossk
from loader_items import Flow, Items

SAMPLER = lossk.SGLD(lr=1e-3, n_beta=5.0, localization=1.0, batch_size=8, num_burnin_steps=1, num_steps_bw_draws=2)
N = 23


def build(model: nn.Module, loader: Any, **settings: Any) -> lossk.LossKernel:
    settings = {"num_chains": 2, "num_draws": 4, "tile": 16, "progress": False, "sampler": SAMPLER} | settings
    return lossk.build_kernel(model, loader, passes=lossk.Passes(probe_batch=10), **settings)


def images(dtype: torch.dtype = torch.float32) -> Items:
    numbers = torch.Generator().manual_seed(1)
    x = (torch.rand(N, 3, 6, 5, generator=numbers, device="cpu") * 8).to(dtype)
    return Items(lambda i: (x[i], i % 3), N)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_kernel_of_streamed_data_is_that_of_resident_data(workers: int) -> None:
    streamed = build(network(), DataLoader(images(), 4, num_workers=workers), data="stream")
    resident = build(network(), DataLoader(images(), 4), data="memory")
    assert np.array_equal(streamed.to_numpy(), resident.to_numpy())
    assert any("data = streamed: 23 samples" in line for line in streamed.meta["passes_reasons"])


def test_every_dtype_a_transform_and_training_data_of_their_own() -> None:
    for dtype in (torch.uint8, torch.float64, torch.bfloat16):
        transform = (lambda x: x.float() / 8) if dtype == torch.uint8 else None
        given: dict[str, Any] = {"transform": transform, "train": images(dtype)}
        found = [build(network(), images(dtype), data=data, **given) for data in ("stream", "memory")]
        assert np.array_equal(found[0].to_numpy(), found[1].to_numpy())


def test_random_streams_stay_where_they_were() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    model = network()
    torch.manual_seed(7)
    build(model, DataLoader(images(), 4, num_workers=1), data="stream")
    assert torch.equal(torch.rand(1), expected)


# --- batches of any form -----------------------------------------------------------------------------------------


class Graphs:
    """A batch of graphs, as PyTorch Geometric makes them: nodes of all graphs in one tensor."""

    def __init__(self, graphs: list[Any]) -> None:
        sizes = [len(graph.x) for graph in graphs]
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        self.x, self.y = torch.cat([graph.x for graph in graphs]), torch.tensor([graph.y for graph in graphs])
        self.edges = torch.cat([graph.edges + start for graph, start in zip(graphs, starts, strict=True)], dim=1)
        self.graph = torch.repeat_interleave(torch.arange(len(graphs)), torch.tensor(sizes))


def ring(i: int) -> Any:
    """A ring of 3 to 6 nodes, directed."""
    size = 3 + i % 4
    numbers = torch.Generator().manual_seed(i)
    x = torch.rand(size, 2, generator=numbers, device="cpu")
    nodes = torch.arange(size, device="cpu")
    return SimpleNamespace(x=x, edges=torch.stack([nodes, nodes.roll(-1)]), y=i % 2)


class Messages(nn.Module):
    """Two rounds of message passing, and the mean over each graph's nodes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.out = nn.Linear(4, 6), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor, count: int) -> Tensor:
        for layer in (self.first, self.second):
            received = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
            x = layer(torch.cat([x, received], dim=1)).relu()
        sums = torch.zeros(count, x.shape[1]).index_add(0, graph, x)
        return self.out(sums / torch.bincount(graph, minlength=count)[:, None])


def graph_losses(model: nn.Module, batch: Graphs) -> Tensor:
    logits = model(batch.x, batch.edges, batch.graph, len(batch.y))
    return nn.functional.cross_entropy(logits, batch.y, reduction="none")


@pytest.mark.parametrize("workers", [0, 1])
def test_graphs(workers: int) -> None:
    """Each row is the loss of a graph: what the model gives for the graph alone, at weights near the trained ones."""
    data = Items(ring, N)
    loader = DataLoader(data, 5, collate_fn=Graphs, num_workers=workers)
    model = Messages()
    kernel = build(model, loader, loss=graph_losses, data="stream")
    assert kernel.num_samples == N
    alone = torch.stack([graph_losses(model, Graphs([ring(i)]))[0] for i in range(N)]).detach()
    close = build(
        model, loader, loss=graph_losses, data="stream", sampler=lossk.Gaussian(sigma=1e-6), num_chains=1, num_draws=2
    )
    np.testing.assert_allclose(close.mean_loss.numpy(), alone.numpy(), atol=1e-4)


def test_graphs_late_layers() -> None:
    loader = DataLoader(Items(ring, N), 5, collate_fn=Graphs)
    kernel = build(Messages(), loader, loss=graph_losses, data="stream", params=["out.*"])
    assert any("not cached" in line and "streamed" in line for line in kernel.meta["passes_reasons"])


def test_nested_tensors() -> None:
    def collate(items: list[Tensor]) -> Tensor:
        return torch.nested.nested_tensor(items, layout=torch.jagged)

    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.layer(part).square().mean() for part in x.unbind()])

    loader = DataLoader(Items(lambda i: ring(i).x, N), 4, collate_fn=collate)
    kernel = build(Squares(), loader, loss=lambda model, batch: model(batch), data="stream")
    assert kernel.num_samples == N


def test_batches_padded_to_their_own_longest() -> None:
    def collate(items: list[Tensor]) -> tuple[Tensor, Tensor]:
        x = nn.utils.rnn.pad_sequence(items, batch_first=True)
        return x, torch.tensor([len(item) for item in items])

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, sizes = batch
        inside = torch.arange(x.shape[1])[None] < sizes[:, None]
        return (model(x).squeeze(2).square() * inside).sum(1) / sizes

    torch.manual_seed(0)
    model, loader = nn.Linear(2, 1), DataLoader(Items(lambda i: ring(i).x, N), 4, collate_fn=collate)
    streamed, padded = (build(model, loader, loss=loss, data=data).to_numpy() for data in ("stream", "memory"))
    np.testing.assert_allclose(streamed, padded, rtol=0, atol=1e-4 * np.abs(padded).max())


# --- refused -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_again_is_refused() -> None:
    assert issubclass(Flow, IterableDataset)
    for source in (DataLoader(Flow(3), batch_size=None), DataLoader(images(), batch_size=None)):
        with pytest.raises(TypeError, match=r"loader must be a map-style dataset.*data='spool' reads"):
            build(network(), source, data="stream")


def test_samples_that_change_are_refused() -> None:
    numbers = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"sample 0 differs from one reading to the next"):
        build(network(), Items(lambda i: (torch.from_numpy(numbers.random((3, 6, 5))), i % 3), N), data="stream")


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        build(network(), Items(lambda i: (torch.full((3, 6, 5), torch.inf), i % 3), N), data="stream")
