"""One state of a model's weights, in any form people have it, matched with the model's own tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
NESTED = ("state_dict", "model_state_dict", "model", "module", "net")  # where training loops keep it in a checkpoint
LISTED = 8  # names in a message


def is_state(value: Any) -> bool:
    """Whether it is one state (or what a person may take for one), not a chain of states."""
    return isinstance(value, Mapping | Tensor | np.ndarray | nn.Module | str | bytes)


class OwnTensors:
    """The parameters and buffers of a model by name, wrappers' prefixes left out.

    `torch.compile`, DDP, DataParallel and FSDP put a prefix before each name of the model they wrap; a state made with
    one and a model without it, or the reverse, are the same weights.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        names = [*parameters, *buffers]
        plain = _plain(names, known=lambda name: False)
        self.tensors: dict[str, Tensor] = {plain[name]: p.data for name, p in parameters.items()}
        self.tensors |= {plain[name]: buffer for name, buffer in buffers.items()}
        self.parameters = {plain[name] for name in parameters}
        own_extra = nn.Module.get_extra_state
        extra = [
            f"{name}._extra_state" if name else "_extra_state"
            for name, module in model.named_modules()
            if type(module).get_extra_state is not own_extra
        ]
        self.extra = set(_plain(extra, known=lambda name: False).values())

    def match(self, state: Mapping[Any, Any]) -> list[tuple[Tensor, Tensor]]:
        """(a tensor of the model, its new value) for each entry; what a module keeps as extra state is left alone.

        Raises:
            TypeError, ValueError: entries that do not fit, each of a kind named at once.
        """
        if wrong := [name for name in state if not isinstance(name, str)]:
            raise TypeError(f"the names of a state must be strings, got {wrong[0]!r}")
        plain = _plain(state, known=lambda name: name in self.tensors or name in self.extra)
        named = {plain[name]: value for name, value in state.items() if plain[name] not in self.extra}
        if unknown := [name for name in named if name not in self.tensors]:
            raise ValueError(self._unknown(state, unknown, named))
        values = {name: _value(name, value) for name, value in named.items()}
        misfits = [
            f"{name!r} must have shape {list(self.tensors[name].shape)}, got {list(value.shape)}"
            for name, value in values.items()
            if value.shape != self.tensors[name].shape
        ]
        if misfits:
            raise ValueError(_listed(misfits, "; "))
        values = {name: self._converted(name, value) for name, value in values.items()}
        self._check_tied(values)
        return [(self.tensors[name], value) for name, value in values.items()]

    def _unknown(self, state: Mapping[str, Any], unknown: list[str], named: Mapping[str, Any]) -> str:
        for key in NESTED:
            if isinstance(state.get(key), Mapping) and key in unknown:
                return f"this is a checkpoint, whose weights are its entry {key!r}: pass checkpoint[{key!r}]"
        missing = [name for name in self.tensors if name not in named]
        left = f"; it has {_listed([repr(name) for name in missing])}, which the state leaves out" if missing else ""
        return f"the model has no parameter or buffer {_listed([repr(name) for name in unknown])}{left}"

    def _converted(self, name: str, value: Tensor) -> Tensor:
        """The value in the dtype of the model's tensor, where nothing but rounding is lost."""
        target = self.tensors[name]
        if value.is_complex() != target.is_complex():
            raise ValueError(f"{name!r} must be {target.dtype}, got {value.dtype}")
        if target.is_floating_point() and not value.is_floating_point():
            raise ValueError(f"{name!r} must hold floating-point numbers, got {value.dtype}")
        new = value.to(device=target.device, dtype=target.dtype)
        if (
            not target.is_floating_point()
            and value.is_floating_point()
            and not bool((new == value.to(new.device)).all())
        ):
            raise ValueError(f"{name!r} must hold {target.dtype}, got {value.dtype} that are not whole numbers")
        # a buffer may hold infinities of its own, as an attention mask does
        bad = ~torch.isfinite(new) if name in self.parameters else torch.isnan(new)
        if bool(bad.any()):
            at = bad.nonzero()[0].tolist()
            raise ValueError(f"{name!r} must be finite, entry {at} is {float(value[tuple(at)])} ({target.dtype})")
        return new

    def _check_tied(self, values: Mapping[str, Tensor]) -> None:
        first: dict[tuple[int, tuple[int, ...]], str] = {}
        for name, value in values.items():
            target = self.tensors[name]
            if target.numel() == 0:
                continue
            other = first.setdefault((target.data_ptr(), tuple(target.shape)), name)
            if not torch.equal(values[other], value):
                raise ValueError(
                    f"{other!r} and {name!r} are one tensor in the model, but the state gives them two values"
                )


def flat_value(state: Tensor | np.ndarray, num_weights: int) -> Tensor:
    """A flat state [P], checked.

    Raises:
        ValueError: another shape, not floating point, or not finite.
    """
    value = _value("a flat state", state)
    if value.shape != (num_weights,):
        raise ValueError(f"a flat state must have shape [{num_weights}], got {list(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"a flat state must hold floating-point numbers, got {value.dtype}")
    bad = (~torch.isfinite(value)).nonzero()
    if bad.numel():
        raise ValueError(f"a flat state must be finite, entry {int(bad[0])} is {float(value[bad[0]])}")
    return value


def _plain(names: Iterable[str], known: Callable[[str], bool]) -> dict[str, str]:
    """Each name without the prefixes of wrappers: "module." only where every unknown name begins with it."""
    plain = {name: WRAPPERS.sub("", name) for name in names}
    while plain and all(short.startswith("module.") for short in plain.values() if not known(short)):
        stripped = {name: s.removeprefix("module.") if not known(s) else s for name, s in plain.items()}
        if stripped == plain:
            break
        plain = stripped
    return plain


def _value(name: str, value: Any) -> Tensor:
    """An entry as a plain dense tensor, without a graph.

    Raises:
        TypeError: it holds no numbers.
    """
    if not isinstance(value, Tensor):
        try:
            value = _cpu_tensor(value)
        except (TypeError, ValueError):
            raise TypeError(f"{name!r} must be a tensor or an array, got {type(value).__name__}") from None
    if value.device.type == "meta" or value.is_quantized:
        kind = "a tensor on the meta device, which has none" if value.device.type == "meta" else "a quantized tensor"
        raise TypeError(f"{name!r} must hold plain numbers, got {kind}")
    value = value.detach()
    return value.to_dense() if value.layout != torch.strided else value


def _listed(parts: list[str], between: str = ", ") -> str:
    more = len(parts) - LISTED
    return between.join(parts[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _cpu_tensor(values: Any) -> Tensor:
    """The values in host memory, without a graph, in their own dtype; Python floats are float64, integers int64.

    `torch.as_tensor` would give Python floats the default dtype, and move everything to the default device.
    """
    if isinstance(values, Tensor):
        return values.detach().cpu()
    return torch.from_numpy(np.asarray(values))
