"""How much is read, and what is shown meanwhile: streams without end, data beyond the memory, promised lengths."""

from __future__ import annotations

import multiprocessing
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lossk
from loader_items import Flow, Items, N, labels, numbers
from lossk.data.reading import read_samples
from lossk.data.room import Room
from lossk.memory import Budget
from lossk.timings import Progress


class Promised(Flow):
    def __len__(self) -> int:
        return 10**12


def endless(kind: type[Flow] = Flow, **settings: Any) -> DataLoader[Any]:
    return DataLoader(kind(), batch_size=None, **settings)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_endless_stream_stops_at_the_memory_asked_for(workers: int, problem: Any, build: Any) -> None:
    """And the message says what is the case, and what to do."""
    with pytest.raises(MemoryError) as caught:
        build(problem.model(), endless(num_workers=workers), memory="1MB")
    for text in (
        "loader has no known length and has not ended after",
        "samples, ",
        "MB",
        "memory=1MB",
        "fewer samples",
    ):
        assert text in str(caught.value)
    assert not multiprocessing.active_children()


def test_an_endless_stream_stops_at_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def free() -> Any:
        return SimpleNamespace(available=20_000_000 - taken)

    def grown(*shape: Any, **settings: Any) -> Tensor:
        nonlocal taken
        made = empty(*shape, **settings)
        taken += made.nbytes
        return made

    empty = torch.empty
    monkeypatch.setattr("psutil.virtual_memory", free)
    monkeypatch.setattr(torch, "empty", grown)
    with pytest.raises(MemoryError, match=r"^data has no known length .* samples, .*this machine has .* free"):
        read_samples(endless(), "data")
    assert 2e6 < taken < 20e6


def test_what_does_not_fit_is_refused_after_the_first_batch() -> None:
    """A length that is known says how much comes; and what one set takes, the next one has not."""
    read: list[int] = []

    def item(i: int) -> Any:
        read.append(i)
        return torch.zeros(250), i

    room = Room(Budget(asked=3_000_000, held=0))
    with pytest.raises(
        MemoryError, match=r"data has 1,000,000 samples, which take 1\.01 GB \(8 are read\).*memory=3MB"
    ):
        read_samples(DataLoader(Items(item, 10**6), 8), "data", room=room)
    assert len(read) == 8
    with pytest.raises(MemoryError, match=r"1,000,000,000,000 samples, which take"):
        read_samples(endless(Promised), "data", room=room)
    read_samples(DataLoader(Items(item, 2000), 100), "first", room=room)
    with pytest.raises(MemoryError, match="second has 2,000 samples"):
        read_samples(DataLoader(Items(item, 2000), 100), "second", room=room)


def test_a_length_that_was_promised_may_be_wrong() -> None:
    class Says(Flow):
        def __len__(self) -> int:
            return self.said

        said = 25

    for said in (25, 3, 1000):
        Says.said = said
        samples = read_samples(DataLoader(Says(4), batch_size=None))
        assert samples.tree[1].tolist() == [*range(N)] * 4
        assert samples.tree[0].untyped_storage().nbytes() == samples.tree[0].nbytes


def test_a_line_says_what_is_read_before_the_first_batch_comes(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    flow = Flow(3, started=lambda: lines.append(capsys.readouterr().err))
    with Progress(True) as bar:
        read_samples(DataLoader(flow, batch_size=None), "train", bar=bar)
        assert "reading train, of no known length, until it ends: 0 samples" in lines[0]
        items = Items(lambda i: lines.append(capsys.readouterr().err) or (torch.zeros(250), i), 100)
        read_samples(items, "train", bar=bar)
        assert "reading train:   0%|" in lines[1]
        assert "0/100 " in lines[1]
        read_samples((numbers(), labels()), "train", bar=bar)  # nothing is read
    assert capsys.readouterr().err.count("reading") <= 2


def test_the_line_of_a_call_tells_samples_and_bytes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, problem: Any
) -> None:
    monkeypatch.setattr("tqdm.tqdm.mininterval", 0.0, raising=False)

    def slow(i: int) -> Any:
        time.sleep(0.08)
        return problem.inputs[i], int(problem.targets[i])

    lossk.predicted_labels(problem.model(), DataLoader(Items(slow, 21), 1))
    shown = capsys.readouterr().err
    assert "reading loader" in shown
    assert "/21 " in shown
    assert " kB" in shown
