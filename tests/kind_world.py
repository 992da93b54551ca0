"""What a user can see of a model, the data and the process, held so that a call can be shown to have left it alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def bits(tensor: Tensor) -> bytes:
    """All values; NaN equals NaN, and minus zero is not zero."""
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def describe(value: Any, seen: set[int]) -> Any:
    """A value as plain nested data: what it holds if it is data, which object it is if it is anything else."""
    if isinstance(value, Tensor):
        return (
            type(value).__name__,
            value.dtype,
            str(value.device),
            tuple(value.shape),
            value.requires_grad,
            value.is_inference(),
            bits(value),
        )
    if isinstance(value, PLAIN):
        return (type(value).__name__, repr(value))
    if isinstance(value, nn.Module) or callable(value) or id(value) in seen:
        return (type(value).__name__, id(value))
    seen = seen | {id(value)}
    if isinstance(value, np.ndarray):
        return ("array", value.dtype, value.shape, value.tobytes())
    if isinstance(value, Mapping):
        return (type(value).__name__, [(describe(k, seen), describe(v, seen)) for k, v in value.items()])
    if isinstance(value, list | tuple):
        return (type(value).__name__, [describe(v, seen) for v in value])
    if isinstance(value, set | frozenset):
        return (type(value).__name__, sorted(repr(describe(v, seen)) for v in value))
    return (type(value).__name__, id(value), describe(getattr(value, "__dict__", {}), seen))


def whereabouts(tensor: Tensor | None) -> Any:
    """Which tensor it is, and where its numbers lie: the user's optimizer and views hold on to both."""
    if tensor is None:
        return None
    return (id(tensor), None if tensor.is_sparse else tensor.data_ptr(), tensor.layout, tensor.is_leaf)


def describe_module(module: nn.Module) -> dict[str, Any]:
    """Everything in a module's `__dict__`, plain attributes included; whereabouts of its parameters and buffers too."""
    found = {name: describe(value, set()) for name, value in vars(module).items()}
    for kind in ("_parameters", "_buffers"):
        tensors = vars(module).get(kind, {})
        found[f"{kind}: whereabouts"] = {name: whereabouts(t) for name, t in tensors.items()}
    for name, parameter in vars(module).get("_parameters", {}).items():
        found[f"{name}.grad"] = None if parameter is None else (whereabouts(parameter.grad), describe_grad(parameter))
    return found


def describe_grad(parameter: Tensor) -> Any:
    return None if parameter.grad is None else describe(parameter.grad, set())


def describe_process() -> dict[str, Any]:
    """Random streams, defaults and modes that belong to the whole process."""
    return {
        "torch's stream": bits(torch.get_rng_state()),
        "numpy's stream": repr(np.random.get_state()),  # noqa: NPY002
        "python's stream": repr(random.getstate()),
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "tf32 of convolutions": torch.backends.cudnn.allow_tf32,
    }


class World:
    """The model, its modules' attributes and modes, its `state_dict`, the data and the process, as they are now.

    Args:
        model: with all its submodules.
        process: False where another thread moves the random streams meanwhile.
        others: by name, whatever else must stay: data, loaders' generators, a trainer.
    """

    def __init__(self, model: nn.Module, *, process: bool = True, **others: Any) -> None:
        self.model, self.process, self.others = model, process, others
        self.before = self._now()

    def _now(self) -> dict[str, Any]:
        now: dict[str, Any] = {"process": describe_process() if self.process else {}}
        for name, module in self.model.named_modules(remove_duplicate=False):
            now[f"module {name!r}"] = {"which": id(module), "mode": module.training, **describe_module(module)}
        state = self.model.state_dict()
        now["state_dict"] = {name: describe(value, set()) for name, value in state.items()}
        for name, value in self.others.items():
            now[name] = {"": describe(value, set())}
        return now

    def assert_same(self) -> None:
        now = self._now()
        assert list(now) == list(self.before)
        changed = [
            f"{place}: {name}"
            for place, then in self.before.items()
            for name in {**then, **now[place]}
            if then.get(name) != now[place].get(name)
        ]
        assert not changed, f"changed: {changed}"
