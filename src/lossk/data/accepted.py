"""What may be in a caller's data: plain dense tensors, and arrays, which become such tensors; the rest is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossk.available import gigabytes
from lossk.data.room import Room
from lossk.data.trees import children, rebuilt

DTYPES = {
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
}  # fmt: skip


def as_tensors(tree: Any, where: str, room: Room) -> Any:
    """The tree with plain tensors, detached, for its tensors and arrays. They are views of the caller's where possible.

    Args:
        where: what messages call the tree; its parts become `where[0]` or `where['key']`.
        room: for the arrays that must be copied.

    Raises:
        TypeError: something else, or a tensor that is not dense and of an ordinary dtype; it is named.
        MemoryError: an array that must be copied does not fit.
    """
    if isinstance(tree, Tensor):
        return _plain(tree, where, room)
    if isinstance(tree, np.ndarray):
        return _of_array(tree, where, room)
    if isinstance(tree, tuple | list):
        odd = next((value for value in tree if isinstance(value, int | float | complex | str | np.generic)), None)
        if odd is not None:
            raise TypeError(
                f"{where} must be a tensor or an array, or be made of them, got a {type(tree).__name__} with "
                f"{type(odd).__name__} in it"
            )
    parts = children(tree)
    if parts is not None:
        return rebuilt(tree, {key: as_tensors(value, f"{where}[{key!r}]", room) for key, value in parts.items()})
    raise TypeError(f"{where} must be a tensor or an array, or be made of them, got {type(tree).__name__}{_hint(tree)}")


def _hint(found: Any) -> str:
    if type(found).__module__.partition(".")[0] == "pandas":
        return "; its to_numpy() is an array"
    return "; a collate_fn can leave it out" if found is None else ""


def _plain(tensor: Tensor, where: str, room: Room) -> Tensor:
    kind = type(tensor)
    if tensor.is_nested:
        raise TypeError(f"{where} must be a dense tensor, got a nested one; pad it: torch.nested.to_padded_tensor")
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:  # DTensor, MaskedTensor: no memory of their own
        hint = "; its full_tensor() is plain" if kind.__name__ == "DTensor" else ""
        raise TypeError(f"{where} must be a plain tensor, got a {kind.__name__}{hint}")
    if tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{where} must be a dense tensor, got one of layout {layout}; its to_dense() is dense")
    if tensor.device.type == "meta":
        raise TypeError(f"{where} must hold numbers, got a tensor on the meta device, which has none")
    if tensor.is_quantized:
        raise TypeError(f"{where} must be a plain tensor, got a quantized one; its dequantize() is plain")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{where} must have an ordinary dtype, got {tensor.dtype}")
    plain = tensor.as_subclass(Tensor).detach().resolve_conj().resolve_neg()
    if not plain.is_inference():
        return plain
    room.check(plain.nbytes, f"{where} is an inference tensor that must be copied ({gigabytes(plain.nbytes)})")
    return plain.clone()  # autograd could not save it


def _of_array(array: np.ndarray, where: str, room: Room) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{where} must be a plain array, got a masked one; its filled() is plain")
    if array.dtype.kind not in "biufc":
        raise TypeError(f"{where} must hold numbers, got an array of dtype {array.dtype}")
    native = array.dtype.newbyteorder("=")
    # A read-only array is copied: torch warns of it, and a model that works in place would crash on a mapped file.
    if not (array.flags.c_contiguous and array.flags.writeable and array.dtype == native):
        room.check(array.nbytes, f"{where} is an array that must be copied ({gigabytes(array.nbytes)})")
        array = array.astype(native, order="C", copy=True, subok=False)
    try:
        return torch.from_numpy(np.asarray(array))
    except TypeError as error:
        raise TypeError(f"{where} must have a dtype that torch knows, got {array.dtype}") from error
