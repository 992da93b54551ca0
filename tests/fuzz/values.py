"""What is tried as an argument: one value of each kind that a caller may pass by mistake."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

F32, F64, I64 = torch.float32, torch.float64, torch.int64


class Opaque:
    """An object of a class that the library has never seen."""

    def __repr__(self) -> str:
        return "Opaque()"


def _numbers(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    count = int(np.prod(shape))
    return torch.linspace(0.1, 2.0, count, dtype=F64).reshape(shape).to(dtype)


# Each is made anew for each call: a call that changes its argument then changes nobody else's.
MAKERS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "5": lambda: 5,
    "0": lambda: 0,
    "-1": lambda: -1,
    "1.5": lambda: 1.5,
    "-0.5": lambda: -0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "1e30": lambda: 1e30,
    "10**12": lambda: 10**12,
    "10**400": lambda: 10**400,
    "2**63": lambda: 2**63,
    "1j": lambda: 1j,
    "Decimal": lambda: Decimal("1.5"),
    "Fraction": lambda: Fraction(3, 2),
    "empty text": lambda: "",
    "no": lambda: "no",
    "text 5": lambda: "5",
    "text with NUL": lambda: "a\0b",
    "long text": lambda: "x" * 10_000,
    "bytes": lambda: b"x",
    "bytearray": lambda: bytearray(b"x"),
    "[]": list,
    "()": lambda: (),
    "{}": dict,
    "[1, 2]": lambda: [1, 2],
    "[-9, 10**9]": lambda: [-9, 10**9],
    "[1.5]": lambda: [1.5],
    "[None]": lambda: [None],
    "['a', 5]": lambda: ["a", 5],
    "ragged": lambda: [[1, 2], [3]],
    "dict": lambda: {"a": 1},
    "dict of 5": lambda: {5: "a"},
    "set": lambda: {1, 2},
    "generator": lambda: (i for i in range(3)),
    "range": lambda: range(3),
    "slice of text": lambda: slice("a", "b"),
    "ellipsis": lambda: ...,
    "object": Opaque,
    "class": lambda: Opaque,
    "int itself": lambda: int,
    "lambda": lambda: lambda *_, **__: None,
    "module": lambda: nn,
    "path": lambda: Path("nowhere") / "x",
    "scalar tensor": lambda: torch.tensor(0.5, dtype=F32),
    "int scalar tensor": lambda: torch.tensor(2, dtype=I64),
    "empty tensor": lambda: torch.zeros(0, dtype=F32),
    "vector": lambda: _numbers(3),
    "int vector": lambda: torch.tensor([0, 7, -3], dtype=I64),
    "matrix": lambda: _numbers(3, 2),
    "int matrix": lambda: torch.ones(2, 3, dtype=I64),
    "cube": lambda: _numbers(2, 3, 2),
    "NaN tensor": lambda: torch.full((2, 4, 8), float("nan"), dtype=F32),
    "NaN vector": lambda: torch.full((8,), float("nan"), dtype=F32),
    "inf matrix": lambda: torch.full((8, 8), float("inf"), dtype=F64),
    "complex tensor": lambda: torch.ones(8, dtype=torch.complex64),
    "bool tensor": lambda: torch.ones(5, dtype=torch.bool),
    "half tensor": lambda: _numbers(8, 2, dtype=torch.float16),
    "meta tensor": lambda: torch.ones(8, 3, device="meta", dtype=F32),
    "sparse tensor": lambda: torch.eye(8, dtype=F32).to_sparse(),
    "grad tensor": lambda: _numbers(8).requires_grad_(),
    "np.int64": lambda: np.int64(2),
    "np.float32": lambda: np.float32(0.5),
    "np.bool": lambda: np.True_,
    "np scalar array": lambda: np.array(2),
    "np matrix": lambda: np.linspace(0.0, 1.0, 6).reshape(3, 2),
    "np objects": lambda: np.array([None, "a"], dtype=object),
    "np texts": lambda: np.array(["a", "b"]),
    "np NaN": lambda: np.full((8, 8), np.nan),
    "np datetime": lambda: np.datetime64("2020-01-01"),
    "Linear": lambda: nn.Linear(2, 2),
    "device": lambda: torch.device("cpu"),
    "dtype": lambda: torch.float32,
}
VALUES = tuple(MAKERS)
