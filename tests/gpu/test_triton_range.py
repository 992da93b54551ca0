"""The range of Triton versions: no kernel uses what the oldest lacks, and at run time another version is named.

Whether every configuration compiles under a version is for `make aot-with TRITON=FOLDER` to say, FOLDER a Triton wheel
unpacked: this list is what would have found a name newer than the oldest one, wherever the tests run.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import triton
from bench import aot

from lossk.errors import BackendError
from lossk.ops import triton_kernels
from lossk.ops.triton_kernels import NEWEST, OLDEST, _outside

KERNELS = sorted((Path(__file__).resolve().parents[2] / "kernels").glob("*.py"))
NAMES_3_4 = """
PropagateNan TRITON_MAX_TENSOR_NUMEL abs add advance arange argmax argmin associative_scan assume async_task
atomic_add atomic_and atomic_cas atomic_max atomic_min atomic_or atomic_xchg atomic_xor bfloat16 bitonic_merge
block_type broadcast broadcast_to cast cat cdiv ceil clamp const constexpr constexpr_function core cos cumprod
cumsum debug_barrier device_assert device_print div_rn dot dot_scaled dtype erf exp exp2 expand_dims extra fdiv
flip float16 float32 float64 float8e4b15 float8e4b8 float8e4nv float8e5 float8e5b16 floor fma full gather
histogram inline_asm_elementwise int1 int16 int32 int64 int8 interleave join load load_tensor_descriptor log
log2 make_block_ptr make_tensor_descriptor math max max_constancy max_contiguous maximum min minimum multiple_of
num_programs pair_uniform_to_normal permute philox philox_impl pi32_t pointer_type program_id rand rand4x
randint randint4x randn randn4x random range ravel reduce reduce_or reshape rsqrt sigmoid sin slice softmax sort
split sqrt sqrt_rn standard static_assert static_print static_range store store_tensor_descriptor str_to_ty sum
swizzle2d tensor tensor_descriptor tensor_descriptor_type topk trans tuple tuple_type uint16 uint32 uint64 uint8
uint_to_uniform_float umulhi view void where xor_sum zeros zeros_like
"""  # of triton.language 3.4.0, the public ones
IN_3_4 = frozenset(NAMES_3_4.split())


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_no_kernel_uses_a_name_that_the_oldest_lacks(path: Path) -> None:
    used = set(re.findall(r"\btl\.([A-Za-z]\w*)", path.read_text()))
    assert used <= IN_3_4, used - IN_3_4


def test_the_list_is_of_the_oldest_version() -> None:
    assert OLDEST == (3, 4)
    assert "to_tensor" not in IN_3_4  # newer, and once used here
    assert {"dot", "load", "store", "full"} <= IN_3_4
    pyproject = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert f'"triton>={OLDEST[0]}.{OLDEST[1]};' in pyproject


def test_a_version_outside_the_range_is_named() -> None:
    assert _outside("3.4.0") == _outside("3.6.1") == _outside(".".join(map(str, NEWEST)) + ".0+git") == ""
    assert _outside("3.3.1") == "Triton 3.3.1 is older than 3.4, the oldest that the kernels compile under"
    assert _outside("2.0") != ""
    assert "newer than" in _outside("4.0.0")
    assert _outside(triton.__version__) == ""


def test_an_older_version_is_refused_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    with pytest.raises(BackendError, match=r"Triton 3\.3\.1 is older than 3\.4.*pip install"):
        triton_kernels.load("rank_update", torch.device("cpu"))


def test_a_newer_version_is_tried_and_named_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu:1")  # of which nothing is known yet
    monkeypatch.setattr(triton, "__version__", "9.1.0")
    monkeypatch.setitem(sys.modules, "lossk.kernels.rank_update", None)
    triton_kernels._tested.cache_clear()
    found = triton_kernels.status("rank_update", device)
    triton_kernels._tested.cache_clear()
    assert not found.available
    assert "Triton 9.1.0 is newer than" in found.reason


def test_only_an_older_version_may_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = aot.Resources("m", "k", "c", 80, 255, aot.SPILLED_BY_OLDER, 0)
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    assert spilling.fault == ""
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert "spills" in spilling.fault
