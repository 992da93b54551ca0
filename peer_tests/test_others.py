"""Under posteriors, Lightning, transformers, umap-learn and TorchDR themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import posteriors
import pytest
import torch
import torch.nn.functional as F
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trainers import DATA, Model, Module, Rows, huggingface_arguments, lightning_settings, network

import lossk
from lossk.interop import posteriors as ours
from lossk.interop import sklearn as graphs
from lossk.interop.checkpoints import (
    CheckpointKernels,
    checkpoints_of,
    huggingface_callback,
    lightning_callback,
    over_checkpoints,
)

torch.set_num_threads(1)
MODEL = network()  # made once: making one sets torch's seed


def build(model: nn.Module) -> lossk.LossKernel:
    sampler = lossk.SGLD(lr=1e-3, n_beta=8.0, localization=1.0, batch_size=8, num_burnin_steps=2, num_steps_bw_draws=1)
    return lossk.build_kernel(
        model, DATA, sampler=sampler, num_chains=2, num_draws=6, tile=16, passes=lossk.Passes(), progress=False
    )


def planted() -> lossk.LossTraces:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 100, 3, generator=generator)
    losses = factors[:, :, torch.arange(90) % 3] + 0.5 * torch.randn(2, 100, 90, generator=generator)
    return lossk.LossTraces(losses)


def log_posterior(params: dict[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
    outputs = torch.func.functional_call(MODEL, params, (batch[0],))
    return -F.cross_entropy(outputs, batch[1]) + 0.01 * posteriors.diag_normal_log_prob(params), outputs


@pytest.mark.parametrize("inplace", [False, True])
def test_posteriors_step_is_ours(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise gives the same weights in posteriors.sgmcmc.sgld and in lossk's transform."""
    params = {name: p.detach().clone() for name, p in network().named_parameters()}
    settings = {"lr": 1e-2, "temperature": 0.1}
    theirs = posteriors.sgmcmc.sgld.build(log_posterior, **settings)
    mine = ours.build(log_posterior, **settings)
    a, b = theirs.init({k: v.clone() for k, v in params.items()}), mine.init(params)
    for step in range(5):
        parts = lossk.ops.philox.normals(0, 0, step, 26).split([p.numel() for p in params.values()])
        noise = dict(zip(params, parts, strict=True))
        xi = iter([noise[name] for name in sorted(noise)])  # the order in which posteriors walks a dict
        monkeypatch.setattr(torch, "randn_like", lambda p: next(xi).view(p.shape))  # noqa: B023
        a, _ = theirs.update(a, DATA, inplace=inplace)
        b, aux = mine.update(b, DATA, inplace=inplace)
        assert aux.shape == (40, 2)
        torch.testing.assert_close(a.log_posterior, b.log_posterior, rtol=1e-5, atol=1e-6)
        for name in params:
            torch.testing.assert_close(a.params[name], b.params[name], rtol=1e-5, atol=1e-6)


def test_draws_of_posteriors_make_a_kernel() -> None:
    model = network()

    def draws(transform: Any) -> Any:
        state = transform.init({name: p.detach().clone() for name, p in model.named_parameters()})
        for _ in range(6):
            state, _ = transform.update(state, DATA, inplace=False)
            yield state.params

    for make in (posteriors.sgmcmc.sgld, posteriors.sgmcmc.sghmc):
        kernel = ours.kernel_from_weights(draws(make.build(log_posterior, lr=1e-3)), model, DATA, progress=False)
        assert kernel.num_draws == 6
        assert float(kernel.variance.min()) > 0


def test_lightning(tmp_path: Path) -> None:
    kernels, module = CheckpointKernels(build), Module()
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)
    trainer = lightning.Trainer(**lightning_settings(tmp_path), callbacks=[lightning_callback(kernels), saving])
    trainer.fit(module, DataLoader(TensorDataset(*DATA), batch_size=10))
    assert [step.name for step in kernels.steps] == ["epoch 0", "epoch 1", "epoch 2"]
    files = checkpoints_of(trainer)
    assert len(files) == 3
    for during, after in zip(kernels.steps, over_checkpoints(module, files, build), strict=True):
        assert torch.equal(during.kernel[:], after.kernel[:])


def test_hugging_face(tmp_path: Path) -> None:
    def of_net(model: nn.Module) -> lossk.LossKernel:
        return build(model.net)

    kernels, model = CheckpointKernels(of_net), Model()
    trainer = transformers.Trainer(
        model=model,
        args=huggingface_arguments(tmp_path),
        train_dataset=Rows(),
        callbacks=[huggingface_callback(kernels)],
    )
    trainer.train()
    assert [step.name for step in kernels.steps] == ["step 2", "step 4"]
    files = checkpoints_of(trainer)
    assert [path.name for path in files] == ["checkpoint-2", "checkpoint-4"]
    for during, after in zip(kernels.steps, over_checkpoints(model, files, of_net), strict=True):
        assert torch.equal(during.kernel[:], after.kernel[:])


def groups_apart(points: np.ndarray) -> bool:
    """Whether each point is nearer to its own group's center than to the others'."""
    groups = np.arange(90) % 3
    centers = np.stack([points[groups == g].mean(axis=0) for g in range(3)])
    return bool((np.linalg.norm(points[:, None] - centers, axis=2).argmin(axis=1) == groups).mean() > 0.95)


def test_umap() -> None:
    import umap

    kernel = lossk.LossKernel.from_traces(planted())
    knn = graphs.knn(kernel, 14)
    points = umap.UMAP(n_neighbors=15, precomputed_knn=(*knn, None), random_state=0, init="random").fit_transform(
        np.zeros((90, 1), dtype=np.float32) + np.arange(90)[:, None]
    )
    assert groups_apart(points)
    sparse = umap.UMAP(n_neighbors=14, metric="precomputed", random_state=0, init="random").fit_transform(
        graphs.neighbor_graph(kernel, 30).maximum(graphs.neighbor_graph(kernel, 30).T)
    )
    assert groups_apart(sparse)


def test_torchdr() -> None:
    import torchdr

    features = graphs.LossKernelTransformer(output="features", num_chains=2).fit_transform(graphs.losses(planted()))
    away = graphs.distance(lossk.LossKernel.from_traces(planted()))
    assert np.abs(np.linalg.norm(features[:, None] - features, axis=2) - away).max() < 1e-3
    points = torchdr.TSNE(perplexity=10, random_state=0, init="normal").fit_transform(torch.from_numpy(features))
    assert groups_apart(points.detach().numpy())
