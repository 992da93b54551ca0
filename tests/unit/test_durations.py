"""Time spans in words."""

from __future__ import annotations

import pytest

from lossk.timings import duration


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"), (89.4, "89 s"), (90, "2 min"), (720, "12 min"), (5370, "1 h 30 min"), (25357, "7 h 3 min"),
        (48 * 3600 - 31, "47 h 59 min"), (76 * 3600, "3 d 4 h"),
    ],
)  # fmt: skip
def test_in_words(seconds: float, said: str) -> None:
    assert duration(seconds) == said
