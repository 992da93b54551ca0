"""A bad argument is refused in words that name it, and leaves nothing behind: drawn from the table in `tests/fuzz`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import lossk
from fuzz.catalog import broken, catalog, seed_streams, unknown
from fuzz.judge import FAULTS, SILENT, Entry, try_value
from fuzz.rules import flag
from fuzz.values import VALUES

EXAMPLES = 1000  # some 20 seconds; `python -m tests.fuzz` tries everything


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Entry]:
    return catalog(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seed_streams()


def test_every_public_callable_has_a_valid_call(entries: dict[str, Entry]) -> None:
    missing, gone = unknown(entries)
    assert not missing, f"no valid call is known for {missing}: add it to tests/fuzz/table_*.py"
    assert not gone, f"not public any more: {gone}"


def test_the_valid_calls_are_valid(entries: dict[str, Entry]) -> None:
    assert broken(entries) == {}


anything = st.one_of(
    st.integers(), st.floats(), st.text(max_size=20), st.booleans(), st.none(), st.binary(max_size=5),
    st.lists(st.one_of(st.integers(-9, 9), st.floats(), st.text(max_size=3)), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), st.complex_numbers(),
)  # fmt: skip


def test_a_bad_argument_is_named(entries: dict[str, Entry]) -> None:
    names = sorted(entries)

    @settings(
        derandomize=True, max_examples=EXAMPLES, deadline=None, database=None,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def drawn(data: st.DataObject) -> None:
        entry = entries[data.draw(st.sampled_from(names))]
        parameter = data.draw(st.sampled_from(sorted(entry.rules)))
        if entry.texts:
            found = try_value(entry, parameter, given=data.draw(st.sampled_from(entry.texts)))
        elif data.draw(st.booleans()):
            found = try_value(entry, parameter, data.draw(st.sampled_from(VALUES)))
        else:
            found = try_value(entry, parameter, given=data.draw(anything))
        assert found.kind not in FAULTS, f"{found.kind}: {entry.name}({parameter}={found.value})  {found.detail}"

    drawn()


def test_the_fuzz_sees_what_is_wrong(tmp_path: Path) -> None:
    """The judge itself: each class of fault, of a function that has it."""

    def moves(x: object) -> None:
        torch.rand(1)
        raise ValueError("x must be True or False")

    def leaves(x: object) -> None:
        Path("left").touch()
        raise ValueError("x must be True or False")

    def unnamed(x: object) -> None:
        lossk.open("\0")

    faults = {moves: "silent", leaves: "silent", unnamed: "unnamed", lambda x: None: "silent", lambda x: x.y: "obscure"}
    for function, kind in faults.items():
        entry = Entry("lossk.it", function, lambda: {"x": True}, {"x": flag})
        assert try_value(entry, "x", "1.5").kind == kind, function
    assert not Path("left").exists()
    assert SILENT in FAULTS
