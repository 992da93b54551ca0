"""Nothing of torch's defaults or modes leaks in: factory calls say dtype and device, and runs agree bitwise."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

import defaults_core
import lossk
from conftest import Classification

SOURCE = Path(lossk.__file__).parent
KERNELS = SOURCE.parent.parent / "kernels"
FLOATS = {
    *("empty", "zeros", "ones", "full", "tensor", "scalar_tensor", "linspace", "logspace", "eye", "rand", "randn"),
    *("normal", "empty_strided", "asarray", "as_tensor", "hann_window", "range"),
}
INTEGERS = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}  # int64 whatever the default
LEGACY = {"Tensor", "FloatTensor", "DoubleTensor", "LongTensor", "HalfTensor", "BoolTensor"}
WEIGHTED = {"Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "LayerNorm", "BatchNorm2d", "TransformerEncoderLayer"}


def faults(source: str) -> list[str]:
    """The factory calls that leave something to a default: "line: call"."""
    tree = ast.parse(source)
    guarded = {
        inner
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        and any("usual_defaults" in ast.unparse(decorator) for decorator in function.decorator_list)
        for inner in ast.walk(function)
    }
    return [
        f"{node.lineno}: {ast.unparse(node)[:80]}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and _leaves_open(node, node.func.value.id, node.func.attr, node in guarded)
    ]


def _leaves_open(node: ast.Call, owner: str, name: str, guarded: bool) -> bool:
    given = {keyword.arg for keyword in node.keywords}
    if owner == "nn":
        return name in WEIGHTED and not guarded and not {"dtype", "device"} <= given
    if owner != "torch":
        return False
    if name in INTEGERS:
        floating = any(isinstance(part, ast.Constant) and isinstance(part.value, float) for part in ast.walk(node))
        return "device" not in given or (floating and "dtype" not in given)
    return name in LEGACY or (name in FLOATS and not {"dtype", "device"} <= given)


@pytest.mark.parametrize("root", [SOURCE, KERNELS])
def test_every_factory_call_says_its_dtype_and_its_device(root: Path) -> None:
    files = sorted(root.rglob("*.py"))
    assert files
    found = [f"{path}:{fault}" for path in files for fault in faults(path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "open_"),
    [
        ("torch.zeros(3)", True),
        ("torch.zeros(3, dtype=torch.float32)", True),
        ("torch.full((3,), 1.0, device=x.device)", True),
        ("torch.as_tensor(x)", True),
        ("torch.arange(3)", True),
        ("torch.arange(0.0, 1.0, device='cpu')", True),
        ("torch.FloatTensor([1])", True),
        ("nn.Linear(2, 3)", True),
        ("@usual_defaults()\ndef make():\n    return nn.Linear(2, 3)", False),
        ("torch.arange(3, device='cpu')", False),
        ("torch.zeros(3, dtype=d, device=x.device)", False),
        ("torch.zeros_like(x)", False),
    ],
)
def test_the_lint_sees_what_it_should(source: str, open_: bool) -> None:
    assert bool(faults(source)) == open_


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """torch's own `empty`, in place of the tests' poisoned one, which a default device does not reach."""
    _device_constructors.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def short_trials() -> Iterator[None]:
    """A tenth of the steps: modes that look at every operation make each twenty times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lossk.pilot.trial_chain.LONGEST", 200)
        patch.setattr("lossk.pilot.trial.MOST_STEPS", 400)
        yield


class NoHalves(TorchDispatchMode):
    """Fails at the first operation that makes bfloat16, which nothing here asks for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, Tensor) and part.dtype == torch.bfloat16:
                raise AssertionError(f"{func} made a bfloat16 tensor of shape {list(part.shape)}")
        return out


@contextmanager
def defaults(dtype: torch.dtype = torch.float32, device: str | None = None) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@contextmanager
def no_halves() -> Iterator[None]:
    with defaults(torch.bfloat16), NoHalves():
        yield


ODD = {
    "bfloat16": no_halves,
    "float64": lambda: defaults(torch.float64),
    "meta": lambda: defaults(device="meta"),
}
AMBIENT = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Bitwise, dtypes and devices included."""
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        other = found[name]
        assert type(other) is type(value), name
        if isinstance(value, Tensor):
            assert (other.dtype, other.device) == (value.dtype, value.device), name
            value, other = value.numpy(), other.numpy()
        np.testing.assert_array_equal(other, value, err_msg=name)


@pytest.fixture(scope="module")
def read() -> dict[str, Any]:
    problem = Classification()
    return defaults_core.read_only(problem, problem.model())


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    problem = Classification()
    return defaults_core.sampling(problem, problem.model(), tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize("odd", ODD)
def test_kernels_are_read_alike_under_odd_defaults(odd: str, read: dict[str, Any]) -> None:
    problem = Classification()
    model = problem.model()
    with ODD[odd]():
        found = defaults_core.read_only(problem, model)
    assert_same(found, read)


@pytest.mark.parametrize("odd", ODD)
def test_kernels_are_sampled_alike_under_odd_defaults(odd: str, sampled: dict[str, Any], tmp_path: Path) -> None:
    problem = Classification()
    model = problem.model()
    with ODD[odd]():
        found = defaults_core.sampling(problem, model, tmp_path)
    assert_same(found, sampled)


@pytest.mark.parametrize("ambient", AMBIENT)
def test_reading_is_the_same_within_a_callers_modes(ambient: str, read: dict[str, Any]) -> None:
    problem = Classification()
    model = problem.model()
    with AMBIENT[ambient]():
        found = defaults_core.read_only(problem, model)
    assert_same(found, read)


def test_results_and_recipes_have_the_usual_dtypes(sampled: dict[str, Any]) -> None:
    kinds = {value.dtype for value in sampled.values() if isinstance(value, Tensor)}
    assert kinds == {torch.float32, torch.float64, torch.int64, torch.bool}
    from lossk.recipes.digits import small_cnn

    with defaults(torch.bfloat16, "meta"):
        model = small_cnn()
        assert torch.get_default_dtype() == torch.bfloat16
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
