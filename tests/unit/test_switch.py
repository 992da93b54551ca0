"""A switch of the process that several threads want at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lossk.switch import Switch


class Lamp:
    on = True

    def __init__(self) -> None:
        self.switch = Switch(lambda: self.on, self.put, self.put)

    def put(self, on: bool) -> None:
        self.on = on


def test_nested_and_after_an_error() -> None:
    lamp = Lamp()

    def call() -> None:
        with lamp.switch.at(False):
            with lamp.switch.at(True):
                assert lamp.on
            assert not lamp.on
            raise KeyError

    with pytest.raises(KeyError):
        call()
    assert lamp.on


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_calls_that_overlap(first_to_end: int) -> None:
    """Each begins while the other is within; whichever ends last, what was before them comes back."""
    lamp, both = Lamp(), threading.Barrier(2, timeout=20)
    ended = threading.Event()

    def call(number: int) -> bool:
        with lamp.switch.at(False):
            both.wait()
            if number != first_to_end:
                assert ended.wait(20)
            seen = lamp.on
        if number == first_to_end:
            ended.set()
        return seen

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(call, (0, 1))) == [False, False]
    assert lamp.on
