"""The checkers of arguments: what each accepts, what it returns, and what it says of the rest."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lossk
from lossk import checks
from lossk.memory import parse_memory
from lossk.settings import check_settings

BAD = (TypeError, ValueError)
RAGGED = [[1.0], [2.0, 3.0]]
HUGE = 10**5000  # its repr fails: more digits than Python writes


class Nothing:
    """A value whose repr fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


ODD: list[Any] = [
    "4", b"4", None, 4.5, 1j, True, np.bool_(False), Decimal(4), [4], (4,), {"a": 4}, {4}, RAGGED, object(), Nothing(),
    np.array([4]), torch.tensor([4]), torch.tensor(True), torch.empty((), device="meta"), np.datetime64(4, "ns"),
    np.timedelta64(4, "ns"), math.nan, math.inf, HUGE, int, SGLD_CLASS := lossk.SGLD, lambda: 4, list(range(10**5)),
]  # fmt: skip


def refused(check: Callable[..., Any], *arguments: Any, **more: Any) -> str:
    """The message of the refusal, which names "size", and is short."""
    with pytest.raises(BAD) as caught:
        check("size", *arguments, **more)
    message = str(caught.value)
    assert message.startswith("size")
    assert len(message) < 400
    return message


# --- scalars -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("four", [4, np.int64(4), np.uint8(4), np.array(4), torch.tensor(4), torch.tensor(4).short()])
def test_integers_become_plain(four: Any) -> None:
    found = checks.check_integer("size", four, 1)
    assert found == 4
    assert type(found) is int


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
def test_what_is_no_integer(value: Any) -> None:
    refused(checks.check_integer, value, 1, 10)


def test_the_bounds_of_integers() -> None:
    assert refused(checks.check_integer, 0, 1) == "size must be at least 1, got 0"
    assert refused(checks.check_integer, 11, 1, 10) == "size must be from 1 to 10, got 11"
    assert refused(checks.check_integer, 11, 1, 10, limit="N") == "size must be an integer from 1 to N, got 11"
    assert refused(checks.check_integer, 2**31, 1) == "size must be at most 2147483647, got 2147483648"
    assert "a value of type int" in refused(checks.check_integer, HUGE, 1)


@pytest.mark.parametrize(
    "half", [0.5, np.float32(0.5), np.float64(0.5), np.float16(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)]
)
def test_numbers_become_plain(half: Any) -> None:
    found = checks.check_number("size", half, above=0.0)
    assert found == 0.5
    assert type(found) is float


@pytest.mark.parametrize(
    "value",
    [v for v in ODD if not isinstance(v, float) or not math.isfinite(v)],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_number(value: Any) -> None:
    refused(checks.check_number, value, above=0.0)


def test_the_bounds_of_numbers() -> None:
    assert refused(checks.check_number, 0, above=0.0) == "size must be finite and greater than 0, got 0"
    assert refused(checks.check_number, -1, least=0.0) == "size must be finite and at least 0, got -1"
    assert refused(checks.check_number, 2, least=0.0, most=1.0) == "size must be at most 1, got 2"
    for value in (1e300, 1e39):
        assert "at most 3.4" in refused(checks.check_number, value, above=0.0)
    assert "of float32" in refused(checks.check_number, 1e-300, above=0.0)
    assert math.copysign(1.0, checks.check_number("size", -0.0, least=0.0)) == 1.0
    assert checks.check_number("size", -3) == -3.0


def test_flags() -> None:
    for value in (True, np.True_, np.array(True), torch.tensor(True)):
        assert checks.check_flag("size", value) is True
    for value in (0, 1, np.int64(1), "no", "True", None, [], torch.tensor([True]), 1.0):
        assert "True or False" in refused(checks.check_flag, value)


def test_choices_are_of_their_own_type() -> None:
    assert checks.check_choice("size", np.str_("a"), ("a", "b")) == "a"
    assert type(checks.check_choice("size", np.str_("a"), ("a", "b"))) is str
    assert checks.check_choice("size", np.bool_(False), (True, False, "auto")) is False
    for value in (0, 1, 1.0, None, ["a"], np.array(["a", "b"]), torch.zeros(3), {"a": 1}):
        refused(checks.check_choice, value, (True, False, "auto"))
    assert "got 'c'" in refused(checks.check_choice, "c", ("a", "b"))


def test_automatic_numbers() -> None:
    assert checks.check_automatic("size", "auto", above=0.0) == "auto"
    for value in ("Auto", "", None, np.array(["auto"]), torch.zeros(2), True):
        refused(checks.check_automatic, value, above=0.0)


# --- texts, callables, objects -----------------------------------------------------------------------------------


def test_lists_of_texts() -> None:
    expected = ("b", "a")
    for given in (["b", "a"], ("b", "a"), (c for c in "ba"), {"b": 1, "a": 2}.keys(), np.array(["b", "a"])):
        assert checks.check_strings("size", given) == expected
    assert checks.check_strings("size", {"b", "a"}) == ("a", "b")
    assert {type(text) for text in checks.check_strings("size", np.array(["b"]))} == {str}
    for value in (5, "ab", b"ab", {"a": 1}, [1], ["a", b"b"], [], [""], None, torch.zeros(2), object(), list):
        refused(checks.check_strings, value)


def test_endless_texts_end() -> None:
    import itertools

    assert "from 1 to" in refused(checks.check_strings, itertools.repeat("a"))


def test_callables_and_instances() -> None:
    assert checks.check_callable("size", len) is len
    for value in (5, "len", nn.ReLU, None):
        refused(checks.check_callable, value)
    assert checks.check_instance("size", None, lossk.SGLD, optional=True) is None
    assert refused(checks.check_instance, SGLD_CLASS, lossk.SGLD).endswith("a lossk.SGLD, got the class SGLD")
    assert refused(checks.check_instance, {}, lossk.SGLD, lossk.HMC, optional=True).endswith("or None, got dict")


def test_paths() -> None:
    assert checks.check_path("size", "a/b") == checks.check_path("size", Path("a/b")) == Path("a/b")
    for value in (5, None, b"a", "", ".", "/", "a\0b", "x" * 300, "\ud800", ["a"], Path(), sys.stdout, True):
        refused(checks.check_path, value)


def test_devices() -> None:
    for value in (None, "cpu", torch.device("cpu")):
        assert checks.check_device("size", value) == value
    for value in (5, 1.0, b"cpu", ["cpu"], "meta", torch.device("meta"), "", True, torch.zeros(2)):
        refused(checks.check_device, value)


# --- nested data -------------------------------------------------------------------------------------------------


def test_json_becomes_plain() -> None:
    given = {"a": np.float32(0.5), "b": (np.int64(1), torch.tensor(2)), "c": {"d": np.bool_(True), "e": None}}
    found = checks.check_json("size", given)
    assert json.loads(json.dumps(found)) == found == {"a": 0.5, "b": [1, 2], "c": {"d": True, "e": None}}
    assert "size['a']['b'][1] must be" in refused(checks.check_json, {"a": {"b": [0, {1, 2}]}})
    round_and_round: dict[str, Any] = {}
    round_and_round["a"] = round_and_round
    refused(checks.check_json, round_and_round)
    for value in (5, [1], "a", {1: 2}, None, {"a": 1j}, {"a": np.zeros(2)}):
        refused(checks.check_json, value)


# --- tensors -----------------------------------------------------------------------------------------------------

READ_ONLY = np.broadcast_to(np.float32(1.0), (2, 3))


@pytest.mark.parametrize(
    "ones",
    [
        [[1, 1, 1], [1, 1, 1]], np.ones((2, 3), ">f8"), np.ones((2, 3), np.float16), np.ones((2, 3))[::-1],
        np.ones((2, 3), np.longdouble), np.ones((2, 3), np.uint16), READ_ONLY, torch.ones(2, 3, requires_grad=True),
        [torch.ones(3), torch.ones(3)], torch.ones(3, 2).T, torch.ones(2, 3, dtype=torch.bfloat16),
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}",
)  # fmt: skip
def test_tensors_of_what_users_have(ones: Any) -> None:
    found = checks.check_tensor("size", ones, (2, "n"))
    assert not found.requires_grad
    assert torch.equal(found.double(), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "value",
    [
        None, "abc", {"a": [1.0]}, {1.0}, RAGGED, [["a"]], [[None]], [[1j]], np.array([[object()]]),
        torch.zeros(2, 3) * 1j,
        torch.eye(2).to_sparse(), torch.empty(2, 3, device="meta"), np.array([["a"]]), (x for x in [1.0]), object(),
        np.array([["2020-01-01"]], dtype="datetime64[s]"), [[HUGE]], nn.Linear(2, 2), torch.Tensor, RuntimeError(),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_no_tensor(value: Any) -> None:
    refused(checks.check_tensor, value, (2, "n"))


def test_shapes_kinds_and_finite_entries() -> None:
    assert refused(checks.check_tensor, torch.ones(2, 3), (3, "n")) == "size must have shape [3, n], got [2, 3]"
    assert "shape [2, n]" in refused(checks.check_tensor, torch.ones(2, 0), (2, "n"))
    assert refused(checks.check_tensor, [0.0, math.nan]) == "size must be finite, got nan at [1]"
    assert checks.check_tensor("size", [math.nan], finite=False).isnan().all()
    for kind, value in (("an integer", [1.0]), ("an integer", [True]), ("a number", [True]), ("a flag", [1])):
        assert f"each entry {kind}" in refused(checks.check_tensor, value, of=kind)


def test_no_default_dtype_leaks_in() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        assert checks.check_tensor("size", [0.1]).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


# --- settings of a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [lossk.SGLD, lossk.BAOAB])
def test_samplers_become_plain(sampler: Any) -> None:
    given = sampler(
        n_beta=np.float64(3.0), localization=np.float32(0.5), batch_size=np.int64(8), num_burnin_steps=torch.tensor(3),
        num_steps_bw_draws=np.uint8(2), control_variate=np.bool_(True), params=np.array(["0.*"]),
    )  # fmt: skip
    plain = sampler(
        n_beta=3, localization=0.5, batch_size=8, num_burnin_steps=3, num_steps_bw_draws=2, control_variate=True,
        params=["0.*"],
    )  # fmt: skip
    assert given == plain
    assert json.dumps(given.to_dict()) == json.dumps(plain.to_dict())


def test_other_settings_become_plain() -> None:
    for given in (
        lossk.HMC(step_size=np.float32(0.5), localization=np.int64(1), num_leapfrog_steps=np.int8(3)),
        lossk.Laplace(n_beta=np.float32(2.0)),
        lossk.Gaussian(sigma=torch.tensor(0.5)),
        lossk.Passes(
            probe_batch=np.int64(3), fold_norms=np.bool_(True), overlap=np.bool_(False), num_threads=np.int8(1)
        ),
    ):
        assert type(given)(**given.to_dict()) == given
        assert json.loads(json.dumps(given.to_dict())) == given.to_dict()


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (lossk.SGLD, "lr", 1e300), (lossk.SGLD, "lr", 1e-300), (lossk.SGLD, "lr", "0.1"), (lossk.SGLD, "lr", True),
        (lossk.SGLD, "params", 5), (lossk.SGLD, "params", []), (lossk.SGLD, "measure_acceptance", 0),
        (lossk.SGLD, "control_variate", 1), (lossk.SGLD, "num_burnin_steps", 10**30), (lossk.SGLD, "batch_size", 2**40),
        (lossk.SGLD, "noise_correction", []), (lossk.SGLD, "noise_correction", 1e300),
        (lossk.BAOAB, "control_variate", "no"), (lossk.BAOAB, "friction", 1j), (lossk.Passes, "fold_norms", 0),
        (lossk.Passes, "compile", 1), (lossk.Passes, "num_threads", 10**6), (lossk.Passes, "frozen_prefix", 1),
        (lossk.Passes, "frozen_prefix", ""), (lossk.Passes, "update_precision", None), (lossk.Laplace, "structure", 3),
    ],
)  # fmt: skip
def test_settings_are_refused_by_name(make: Any, name: str, value: Any) -> None:
    with pytest.raises(BAD, match=f"^{name} must be"):
        make(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_draws", 10**12), ("num_chains", 10**9), ("tile", 2**40), ("panel", 2**31), ("seed", None), ("resume", 0),
        ("resume", "no"), ("progress", 5), ("progress", None), ("distributed", 1), ("distributed", "no"), ("device", 5),
        ("transform", 5), ("transform", nn.ReLU), ("out", 5), ("out", ""), ("memory", "1" * 400 + "GB"),
        ("memory", 0.5),
        ("memory", True), ("memory", "0.1B"), ("memory", 10**30), ("form", 1), ("backend", None), ("precision", False),
    ],
)  # fmt: skip
def test_a_calls_settings_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(BAD, match=f"^{name} must be"):
        check_settings(**{name: value})


def test_draws_of_all_chains_are_bounded() -> None:
    with pytest.raises(ValueError, match="num_chains times num_draws must be at most 10000000, got 10 x 5000000"):
        check_settings(num_chains=10, num_draws=5 * 10**6)


def test_memory_of_numpy() -> None:
    assert parse_memory(np.int64(10**9)) == 10**9
    assert type(parse_memory(np.int64(10**9))) is int


def test_errors_show_values_shortly() -> None:
    for value in (list(range(10**6)), "x" * 10**6, torch.zeros(10**3), Nothing(), HUGE, {i: i for i in range(10**4)}):
        assert len(checks.shown(value)) < 200
