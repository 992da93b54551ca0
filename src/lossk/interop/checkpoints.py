"""A loss kernel per checkpoint of a training run, and what changes from one to the next.

    def build(model):
        return lossk.build_kernel(model, probe, train=train, sampler=sampler)

    for step in over_checkpoints(model, ["epoch1.pt", "epoch2.pt"], build): ...   # files, or state dicts
    for step in over_checkpoints(model, checkpoints_of(trainer), build): ...      # Lightning, Hugging Face: afterwards
    Trainer(callbacks=[lightning_callback(kernels := CheckpointKernels(build))])  # or while they train
    Trainer(callbacks=[huggingface_callback(kernels := CheckpointKernels(build))])

Compare kernels at one and the same sampler: with "auto" each checkpoint would be probed at settings of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lossk.analysis.compare import Comparison, compare_kernels
from lossk.checks import check_callable, check_instance, check_integer, check_place, check_text, shown
from lossk.kernel.kernel import LossKernel
from lossk.optional import require
from lossk.records import check_record

Build = Callable[[nn.Module], LossKernel]


@dataclass(frozen=True)
class CheckpointKernel:
    """The kernel of one checkpoint."""

    name: str
    kernel: LossKernel
    change: Comparison | None  # from the checkpoint before: CKA, entry correlation, neighbors; None for the first

    def __post_init__(self) -> None:
        check_record(self)


class CheckpointKernels:
    """Kernels of one model at successive times, each compared with the one before.

    Args:
        build: the kernel of the model as it is now, always over the same probe samples.
        k: neighbors compared.

    Attributes:
        steps: [CheckpointKernel], in the order added.
    """

    def __init__(self, build: Build, *, k: int = 10) -> None:
        self.build, self.k = check_callable("build", build), check_integer("k", k, 1)
        self.steps: list[CheckpointKernel] = []

    def add(self, model: nn.Module, name: str) -> CheckpointKernel:
        """Build and compare; the model's modes, flags and gradients are left as they were.

        Raises:
            TypeError: build did not return a LossKernel.
            ValueError: a kernel of another number of samples than the one before.
        """
        check_instance("model", model, nn.Module)
        check_text("name", name)
        step = _step(self.build, model, name, self.steps[-1].kernel if self.steps else None, self.k)
        self.steps.append(step)
        return step


def over_checkpoints(
    model: nn.Module, checkpoints: Iterable[str | Path | Mapping[str, Tensor]], build: Build, *, k: int = 10
) -> Iterator[CheckpointKernel]:
    """The kernel of each checkpoint in order; two kernels are alive at a time.

    Args:
        model: the network of the checkpoints; its own weights are back, bit-identical, after each of them.
        checkpoints: state dicts, or paths of files with one: torch's (`torch.load(weights_only=True)`, so that nothing
            in them can execute; Lightning's "state_dict" is looked into), .safetensors, or directories of a Hugging
            Face checkpoint.
        build: the kernel of a model, always over the same probe samples.
        k: neighbors compared.

    Raises:
        ValueError: a checkpoint that does not fit the model.
        FileNotFoundError, TypeError: no checkpoint.
    """
    check_instance("model", model, nn.Module)
    build, k = check_callable("build", build), check_integer("k", k, 1)
    if isinstance(checkpoints, str | bytes | Mapping | Tensor | np.ndarray) or not isinstance(checkpoints, Iterable):
        raise TypeError(f"checkpoints must be a list of paths or of state dicts, got {shown(checkpoints)}")
    return _over_checkpoints(model, checkpoints, build, k)


def _over_checkpoints(
    model: nn.Module, checkpoints: Iterable[str | Path | Mapping[str, Tensor]], build: Build, k: int
) -> Iterator[CheckpointKernel]:
    before: LossKernel | None = None
    for number, checkpoint in enumerate(checkpoints):
        name, state = str(number), checkpoint
        if isinstance(checkpoint, str | Path):
            name, state = Path(checkpoint).name, _read_state(f"checkpoints[{number}]", checkpoint)
        if not isinstance(state, Mapping):
            raise TypeError(f"checkpoints must be paths or state dicts, number {number} is {type(state).__name__}")
        if not state or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
            raise TypeError(f"checkpoints[{number}] must be a state dict, names to tensors, got {shown(state)}")
        own = {key: value.clone() for key, value in model.state_dict().items()}
        try:
            _load(model, state, name)
            step = _step(build, model, name, before, k)
        finally:
            model.load_state_dict(own)
        before = step.kernel
        yield step


def _step(build: Build, model: nn.Module, name: str, before: LossKernel | None, k: int) -> CheckpointKernel:
    kernel = build(model)
    if not isinstance(kernel, LossKernel):
        raise TypeError(f"build must return a LossKernel, got {type(kernel).__name__}")
    change = None if before is None else compare_kernels(before, kernel, k=k)
    return CheckpointKernel(name, kernel, change)


def _load(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ValueError(f"checkpoints: checkpoint {name} does not fit the model: {error}") from error


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file or a Hugging Face checkpoint directory.

    Raises:
        FileNotFoundError: none is there.
        ValueError: the file holds something else, or objects that only an unsafe load would read.
        ImportError: safetensors is needed and not installed.
    """
    return _read_state("path", path)


def _read_state(argument: str, path: str | Path) -> dict[str, Tensor]:
    path = check_place(argument, path)
    if not path.exists():
        raise FileNotFoundError(f"{argument} must be a file or a folder that is there, nothing is at {str(path)!r}")
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{argument}={str(path)!r} must hold model.safetensors or pytorch_model.bin")
        path = found[0]
    if path.suffix == ".safetensors":
        return require("safetensors.torch", "checkpoints", "a .safetensors file").load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{argument}={str(path)!r} must be a file of tensors that torch.load(weights_only=True) reads: {error}"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{argument}={str(path)!r} must hold a state dict, names to tensors")
    return dict(state)


def checkpoints_of(trainer: Any) -> list[Path]:
    """The checkpoints that a trainer has written, by time of their last change.

    Args:
        trainer: a Lightning Trainer (the files in the directory of its checkpoint callback) or a Hugging Face Trainer
            (the "checkpoint-N" in its output directory).

    Raises:
        TypeError: neither.
        FileNotFoundError: it has written none.
    """
    callback = getattr(trainer, "checkpoint_callback", None)
    if callback is not None and getattr(callback, "dirpath", None):
        found = list(Path(callback.dirpath).glob("*.ckpt"))
        return _in_order(found, callback.dirpath)
    output = getattr(getattr(trainer, "args", None), "output_dir", None)
    if output is None:
        raise TypeError(
            "trainer must be a Lightning Trainer with a checkpoint callback or a Hugging Face Trainer, "
            f"got {type(trainer).__name__}"
        )
    steps = [path for path in Path(output).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return _in_order(steps, output)


def _in_order(found: list[Path], where: Any) -> list[Path]:
    if not found:
        raise FileNotFoundError(f"trainer has written no checkpoint to {where}")
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def lightning_callback(kernels: CheckpointKernels, *, every_n_epochs: int = 1) -> Any:
    """A Lightning callback that adds a kernel to `kernels` after every n-th training epoch.

    Raises:
        ImportError: lightning is not installed.
    """
    check_instance("kernels", kernels, CheckpointKernels)
    every_n_epochs = check_integer("every_n_epochs", every_n_epochs, 1)
    lightning = require("lightning", "lightning", "its callback")

    class KernelsWhileTraining(lightning.pytorch.Callback):  # type: ignore[name-defined]
        def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
            if (trainer.current_epoch + 1) % every_n_epochs == 0:
                kernels.add(pl_module, f"epoch {trainer.current_epoch}")

    return KernelsWhileTraining()


def huggingface_callback(kernels: CheckpointKernels) -> Any:
    """A Hugging Face TrainerCallback that adds a kernel to `kernels` whenever the Trainer saves a checkpoint.

    Raises:
        ImportError: transformers is not installed.
    """
    check_instance("kernels", kernels, CheckpointKernels)
    transformers = require("transformers", "text", "its trainer's callback")

    class KernelsWhileTraining(transformers.TrainerCallback):  # type: ignore[name-defined]
        def on_save(self, args: Any, state: Any, control: Any, **local: Any) -> None:
            kernels.add(local["model"], f"step {state.global_step}")

    return KernelsWhileTraining()
