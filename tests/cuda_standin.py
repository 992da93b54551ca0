"""A stand-in for a CUDA device: the CPU, under torch calls that keep apart what lies on the host and what "on cuda:0".

`with StandIn() as device:` marks the memory of tensors that were made on, or moved to, "cuda". Every torch call in the
block is then held to the rules of a real device: host and device tensors do not meet (0-dimensional host tensors, host
indices and copies aside), NumPy does not read device memory, and only host memory is pinned. What makes the host wait
for the device is counted, by the line of lossk that asks. Triton's kernels run in its interpreter, and refuse host
tensors. It finds wrong devices and needless waiting. It cannot find races, nor anything that is wrong on a GPU alone.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
MEMORY = 2**33  # bytes of the device
KERNELS = ("head_loss", "normals", "rank_update", "sample_loss", "sgld_step", "top_correlations")
# What gives the host a number, or a shape, that the device has to compute first.
READS = {
    "item", "tolist", "__float__", "__int__", "__bool__", "__index__", "equal", "allclose", "nonzero", "argwhere",
    "unique", "masked_select", "linalg_eigh", "eigh", "__contains__", "bincount",
}  # fmt: skip
MEETING = {"copy_", "_foreach_copy_", "_has_compatible_shallow_copy_type"}  # calls that may take tensors of both kinds
STRICT = {"cat", "stack", "equal", "gather", "index_select"}  # calls that refuse even numbers on the host
SOURCES = tuple(str(Path(__file__).resolve().parents[1] / part) for part in ("src", "kernels", "bench"))


class WrongDeviceError(RuntimeError):
    """What CUDA would have refused."""


class Stream:
    """A stream on which everything is done at once."""

    made = 0

    def __init__(self, device: Any = None, **options: Any) -> None:
        type(self).made += 1

    def wait_stream(self, other: Stream) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *event: Any) -> None: ...


class Event:
    """An event that has happened."""

    def __init__(self, **options: Any) -> None: ...

    def record(self, *stream: Any) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1e3  # ms: long enough that nothing is repeated to be timed


class Autocast(torch.autocast):
    """The CPU's, whichever device it is asked for."""

    def __init__(self, device_type: str, *given: Any, **options: Any) -> None:
        super().__init__("cpu", *given, **options)


class _AnyGenerator(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch._C.Generator)


class Generator(metaclass=_AnyGenerator):
    """The CPU's, whichever device it is asked for."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc]
        return torch._C.Generator("cpu")


class StandIn(TorchFunctionMode):
    """The mode itself.

    Args:
        free: bytes of the device that count as free.

    Attributes:
        waits: (call, line of lossk) -> how often the host waited.
        launches: call -> how often something ran on the device.
    """

    def __init__(self, free: int = MEMORY) -> None:
        super().__init__()
        self.free = free
        self.waits: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[str] = Counter()
        self._memory: dict[int, Any] = {}  # storages on the device, kept so that no other gets their address
        self._undo = contextlib.ExitStack()

    def on(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the device."""
        return tensor.untyped_storage()._cdata in self._memory if tensor.layout == torch.strided else False

    def put(self, tree: Any) -> Any:
        """Have all strided tensors of a tree lie on the device."""
        for tensor in tensors_of(tree):
            if tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                self._memory[storage._cdata] = storage
        return tree

    def __enter__(self) -> StandIn:
        Stream.made = 0
        current, cuda = Stream(), torch.cuda
        nothing: Callable[..., Any] = lambda *given, **options: None  # noqa: E731
        stands = {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "Stream": Stream,
            "Event": Event, "current_stream": lambda device=None: current, "stream": _as_it_is, "device": _as_it_is,
            "device_of": _as_it_is, "set_device": nothing, "synchronize": self._synchronize, "empty_cache": nothing,
            "reset_peak_memory_stats": nothing, "memory_allocated": lambda device=None: 0,
            "memory_reserved": lambda device=None: 0, "max_memory_allocated": lambda device=None: 2**20,
            "mem_get_info": lambda device=None: (self.free, MEMORY), "get_device_name": lambda device=None: "stand-in",
            "get_device_properties": lambda device=None: SimpleNamespace(
                multi_processor_count=2, name="stand-in", total_memory=MEMORY, major=9, minor=0
            ),
        }  # fmt: skip
        for name, stand in stands.items():
            self._undo.enter_context(mock.patch.object(cuda, name, stand))
        self._undo.enter_context(mock.patch.object(torch, "autocast", Autocast))
        self._undo.enter_context(mock.patch.object(torch, "Generator", Generator))
        self._undo.enter_context(mock.patch.object(torch, "compile", lambda network, **options: network))
        used = lambda tensor, stream: self._record_stream(tensor, stream)  # noqa: E731 - a method of Tensor binds
        self._undo.enter_context(mock.patch.object(Tensor, "record_stream", used))
        for name in KERNELS:
            module = importlib.import_module(f"lossk.kernels.{name}")
            self._undo.enter_context(mock.patch.object(module, "launch", self._launcher(name, module.launch)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._undo.close()

    def _synchronize(self, device: Any = None) -> None:
        self._wait("synchronize")

    def _launcher(self, name: str, launch: Callable[..., None]) -> Callable[..., None]:
        def checked(config: Any, programs: int, *arguments: Any) -> None:
            if any(isinstance(each, Tensor) and not self.on(each) for each in arguments):
                raise WrongDeviceError(f"the {name} kernel is given a host tensor")
            self.launches[f"triton {name}"] += 1
            with torch._C.DisableTorchFunction():
                launch(config, programs, *arguments)

        return checked

    def _wait(self, call: str) -> None:
        self.waits[call, _asker()] += 1

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), function.__name__
        if name == "__get__":
            return self._attribute(function, args)
        if name == "__set__":
            return function(*args)
        special = getattr(self, f"_call_{name.strip('_')}", None)
        if special is not None:
            return special(function, *args, **kwargs)
        return self._ordinary(function, name, args, kwargs)

    def _attribute(self, function: Any, args: Any) -> Any:
        asked = getattr(function.__self__, "__name__", "")
        here = {"device": CUDA, "is_cuda": True, "is_cpu": False}
        return here[asked] if asked in here and self.on(args[0]) else function(*args)

    def _call_numpy(self, function: Any, tensor: Tensor, *given: Any, force: bool = False, **options: Any) -> Any:
        if self.on(tensor) and not force:
            raise WrongDeviceError("can't convert cuda:0 device type tensor to numpy")
        if self.on(tensor):
            self._wait("cpu")
        return function(tensor, *given, force=force, **options) if force else function(tensor, *given, **options)

    _call_array = _call_numpy

    def _record_stream(self, tensor: Tensor, stream: Stream) -> None:
        if not self.on(tensor):
            raise WrongDeviceError("record_stream of a host tensor")

    def _call_pin_memory(self, function: Any, tensor: Tensor, *device: Any) -> Tensor:
        if self.on(tensor):
            raise WrongDeviceError("only dense CPU tensors can be pinned")
        return tensor.clone(memory_format=torch.preserve_format)

    def _call_get_device(self, function: Any, tensor: Tensor) -> int:
        return 0 if self.on(tensor) else -1

    def _call_cpu(self, function: Any, tensor: Tensor, **options: Any) -> Tensor:
        return self._moved(tensor, CPU, blocking=True)

    def _call_cuda(
        self, function: Any, tensor: Tensor, *device: Any, non_blocking: bool = False, **options: Any
    ) -> Any:
        return self._moved(tensor, CUDA, blocking=not non_blocking)

    def _call_to(self, function: Any, tensor: Tensor, *given: Any, **options: Any) -> Tensor:
        """Split in two: the move, and what is left of the call."""
        device, rest = options.pop("device", None), []
        for each in given:
            if isinstance(each, Tensor):
                device, each = (CUDA if self.on(each) else CPU), each.dtype
            if isinstance(each, str | torch.device | int) and not isinstance(each, bool):
                device = each
            elif not isinstance(each, bool | None):  # of `to(device, dtype, non_blocking)`
                rest.append(each)
        out = tensor
        if rest or any(value is not None for value in options.values()):
            out = function(tensor, *rest, **options)
            out = self.put(out) if self.on(tensor) else out
        if device is None:
            return out
        return self._moved(out, _device(device), blocking=not options.get("non_blocking", False))

    def _moved(self, tensor: Tensor, device: torch.device, *, blocking: bool) -> Tensor:
        if (device.type == "cuda") == self.on(tensor):
            return tensor
        out = tensor.clone(memory_format=torch.preserve_format)
        if device.type == "cuda":
            self.launches["upload"] += 1
            return self.put(out)
        if blocking:
            self._wait("cpu")
        return out

    def _ordinary(self, function: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = list(tensors_of((args, kwargs)))
        there = [self.on(each) for each in tensors]
        asked = None if kwargs.get("device") is None else _device(kwargs["device"])
        if asked is not None:
            kwargs["device"] = CPU if asked.type == "cuda" else asked
        if asked is None or not (name.endswith("_like") or name.startswith("new_")):
            self._check_meeting(name, args, tensors, there)
        if any(there):
            self._count(name, args)
        out = function(*args, **kwargs)
        if name in MEETING or name == "__setitem__" or name == "set_":
            return out  # its own memory, where it was
        if asked.type == "cuda" if asked is not None else any(there):
            self.launches[name] += 1
            self.put(out)
        return out

    def _check_meeting(self, name: str, args: Any, tensors: list[Tensor], there: list[bool]) -> None:
        if all(there) or not any(there) or name in MEETING:
            return
        if name in ("__getitem__", "__setitem__"):
            own, places = self.on(args[0]), list(tensors_of(args[1]))
            wrong = not own and any(self.on(each) for each in places)
            value = args[2] if len(args) > 2 else None
            # A slice is copied into from anywhere; index_put_ takes values of its own device, or numbers.
            wrong |= isinstance(value, Tensor) and bool(places) and value.dim() > 0 and self.on(value) != own
        else:
            wrong = name in STRICT or any(each.dim() > 0 for each, on in zip(tensors, there, strict=True) if not on)
        if wrong:
            where = [
                f"{list(each.shape)} on {'cuda:0' if on else 'cpu'}" for each, on in zip(tensors, there, strict=True)
            ]
            raise WrongDeviceError(f"{name}: expected all tensors to be on the same device, got {', '.join(where)}")

    def _count(self, name: str, args: Any) -> None:
        if name in READS or (name in ("copy_", "__setitem__") and not self.on(args[0])):
            self._wait(name)
        elif name in ("__getitem__", "__setitem__"):
            places = list(tensors_of(args[1]))
            if any(each.dtype == torch.bool for each in places):
                self._wait(name)


def _device(given: Any) -> torch.device:
    return CUDA if isinstance(given, int) or torch.device(given).type == "cuda" else torch.device(given)


@contextlib.contextmanager
def _as_it_is(*given: Any, **options: Any) -> Iterator[None]:
    yield


def _asker() -> str:
    """The innermost line of lossk on the stack, file:function."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(SOURCES):
            return f"{Path(code.co_filename).name}:{code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and dictionaries."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from tensors_of(part)
    elif isinstance(tree, dict):
        yield from tensors_of(tuple(tree.values()))
