"""Which of a model's parameters are sampled, and which models can be."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def select_parameters(model: nn.Module, patterns: Sequence[str] | None) -> tuple[list[str], list[nn.Parameter]]:
    """Names and parameters to sample: those that require grad, or those whose name matches a pattern; tied ones once.

    Raises:
        ValueError: nothing selected, an uninitialised or a complex parameter, or more than one device.
    """
    every = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name, _ in every):
            names = ", ".join(name for name, _ in every[:8])
            raise ValueError(f"params: pattern {pattern!r} matches no parameter; the model has {names or 'none'}, ...")
    chosen: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in every:
        wanted = parameter.requires_grad if patterns is None else any(fnmatchcase(name, p) for p in patterns)
        if wanted:
            chosen.setdefault(id(parameter), (name, parameter))
    if not chosen:
        raise ValueError("model must have a parameter that requires grad (or matches params=), got none")
    for name, parameter in chosen.values():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"model parameter {name} is uninitialised; run one forward pass first")
        if parameter.is_inference():
            raise ValueError(f"model parameter {name} was made under torch.inference_mode(); make the model without it")
        if not parameter.is_floating_point():
            raise ValueError(f"model parameters to sample must be real floating point, {name} is {parameter.dtype}")
    return [name for name, _ in chosen.values()], [parameter for _, parameter in chosen.values()]


def check_model(model: nn.Module) -> None:
    """Refuse by name what cannot be frozen, moved and sampled.

    Raises:
        TypeError: it is not a Module.
        ValueError: a parameter or buffer that is sharded, on no device, quantised or sparse; a module that is
            quantised; parametrizations that are cached; more than one device; batch norm without running statistics.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    named = [("parameter", *each) for each in model.named_parameters()]
    for kind, name, tensor in [*named, *(("buffer", *each) for each in model.named_buffers())]:
        _check_tensor(kind, name, tensor)
    for name, module in model.named_modules():
        _check_module(name or "itself", module)
    if parametrize._cache_enabled and any(map(parametrize.is_parametrized, model.modules())):
        raise ValueError(
            "model must not be under torch.nn.utils.parametrize.cached(), which keeps what is computed from its "
            "weights while they move; leave that block first"
        )
    devices = {str(t.device) for t in [*model.parameters(), *model.buffers()]}
    if len(devices) > 1:
        raise ValueError(f"model must be on one device, got {sorted(devices)}")


def _check_tensor(kind: str, name: str, tensor: Tensor) -> None:
    found = None
    if hasattr(tensor, "device_mesh"):
        found = "is sharded over processes (a DTensor, as FSDP2 makes); gather the model first (full_tensor())"
    elif tensor.is_meta:
        found = "is on the meta device and holds no numbers; load the weights first (to_empty(), load_state_dict())"
    elif tensor.is_quantized:
        found = f"is quantised ({tensor.dtype}); take the model in floating point"
    elif tensor.layout != torch.strided:
        found = f"is sparse ({tensor.layout}); hold it dense (to_dense())"
    elif hasattr(tensor, "ds_id"):
        found = "is partitioned by DeepSpeed (ZeRO 3); gather the model first (deepspeed.zero.GatheredParameters)"
    elif is_traceable_wrapper_subclass(tensor):
        found = f"is a {type(tensor).__name__}, which stands for other tensors; take the model in plain ones"
    if found is not None:
        raise ValueError(f"model {kind} {name!r} {found}")


def _check_module(name: str, module: nn.Module) -> None:
    if type(module).__name__ == "FullyShardedDataParallel":
        raise ValueError(f"model: module {name!r} is sharded over processes (FSDP); gather the model first")
    if ".quantized." in f"{type(module).__module__}.":
        raise ValueError(f"model: module {name!r} is quantised ({type(module).__name__}); take it in floating point")
    if isinstance(module, _NormBase) and module.running_mean is None and "Instance" not in type(module).__name__:
        raise ValueError(
            f"model: batch norm {name!r} keeps no running statistics, so a sample's loss would depend on its batch"
        )


def is_compiled(network: nn.Module) -> bool:
    """Whether a part of it is compiled: what is hung around it would have to be compiled too."""
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in network.modules()
    )
