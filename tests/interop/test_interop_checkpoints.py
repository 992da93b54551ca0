"""A kernel per checkpoint: files, state dicts, and trainers' callbacks by small stand-ins for both frameworks."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lossk
from lossk.analysis.compare import compare_kernels
from lossk.interop.checkpoints import (
    CheckpointKernels,
    checkpoints_of,
    huggingface_callback,
    lightning_callback,
    over_checkpoints,
    read_state,
)

DATA = (torch.randn(24, 3, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 2)


def build(model: nn.Module) -> lossk.LossKernel:
    sampler = lossk.SGLD(lr=1e-3, n_beta=8.0, localization=1.0, batch_size=8, num_burnin_steps=2, num_steps_bw_draws=1)
    return lossk.build_kernel(
        model, DATA, sampler=sampler, num_chains=2, num_draws=6, tile=16, passes=lossk.Passes(), progress=False
    )


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_a_kernel_per_checkpoint_and_the_change(tmp_path: Path) -> None:
    trained = [network(seed) for seed in (0, 1, 1)]
    torch.save(trained[0].state_dict(), tmp_path / "a.pt")
    torch.save({"state_dict": trained[1].state_dict(), "epoch": 3}, tmp_path / "b.ckpt")
    model = network(9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoints: list[Any] = [tmp_path / "a.pt", str(tmp_path / "b.ckpt"), trained[2].state_dict()]
    steps = list(over_checkpoints(model, checkpoints, build))
    assert [step.name for step in steps] == ["a.pt", "b.ckpt", "2"]
    for step, own in zip(steps, trained, strict=True):
        assert torch.equal(step.kernel[:], build(own)[:])
    assert steps[0].change is None
    expected = compare_kernels(steps[0].kernel, steps[1].kernel)
    assert steps[1].change is not None
    assert steps[1].change.to_dict() == expected.to_dict()
    assert steps[1].change.overlap < 1.0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_no_change_is_no_change() -> None:
    model = network()
    state = model.state_dict()
    first, second = over_checkpoints(model, [state, state], build)
    assert torch.equal(first.kernel[:], second.kernel[:])
    assert second.change is not None
    assert second.change.cka_r == pytest.approx(1.0)
    assert second.change.overlap == 1.0
    assert (second.change.gained == -1).all()


def test_bad_checkpoints(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(ValueError, match="checkpoint 0 does not fit the model"):
        list(over_checkpoints(model, [{"0.weight": torch.zeros(1)}], build))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must hold a state dict"):
        read_state(tmp_path / "list.pt")
    torch.save({"x": Path("code")}, tmp_path / "unsafe.pt")
    with pytest.raises(ValueError, match="weights_only=True"):
        read_state(tmp_path / "unsafe.pt")
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        read_state(tmp_path)
    with pytest.raises(TypeError, match="build must return a LossKernel"):
        CheckpointKernels(lambda model: 3).add(model, "x")  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="paths or state dicts"):
        list(over_checkpoints(model, [3], build))  # type: ignore[list-item]


def test_the_checkpoints_of_trainers(tmp_path: Path) -> None:
    import os

    for i, name in enumerate(("epoch=9.ckpt", "epoch=10.ckpt")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (i, i))
    lightning = types.SimpleNamespace(checkpoint_callback=types.SimpleNamespace(dirpath=str(tmp_path)))
    assert [path.name for path in checkpoints_of(lightning)] == ["epoch=9.ckpt", "epoch=10.ckpt"]
    for i, name in enumerate(("checkpoint-90", "checkpoint-100", "checkpoint-best")):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (i, i))
    trainer = types.SimpleNamespace(args=types.SimpleNamespace(output_dir=str(tmp_path)))
    assert [path.name for path in checkpoints_of(trainer)] == ["checkpoint-90", "checkpoint-100"]
    with pytest.raises(TypeError, match="Lightning Trainer"):
        checkpoints_of(3)
    (tmp_path / "empty").mkdir()
    trainer.args.output_dir = str(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="written no checkpoint"):
        checkpoints_of(trainer)


def test_callbacks_while_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the base classes and calls of both trainers; the real ones are in peer_tests."""
    lightning = types.ModuleType("lightning")
    lightning.pytorch = types.SimpleNamespace(Callback=object)  # type: ignore[attr-defined]
    transformers = types.ModuleType("transformers")
    transformers.TrainerCallback = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning", lightning)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    model = network().train()
    kernels = CheckpointKernels(build)
    callback = lightning_callback(kernels, every_n_epochs=2)
    for epoch in range(4):
        callback.on_train_epoch_end(types.SimpleNamespace(current_epoch=epoch), model)
    assert [step.name for step in kernels.steps] == ["epoch 1", "epoch 3"]
    assert model.training
    kernels = CheckpointKernels(build)
    saved = huggingface_callback(kernels)
    saved.on_save(None, types.SimpleNamespace(global_step=500), None, model=model, optimizer=None)
    assert kernels.steps[0].name == "step 500"
