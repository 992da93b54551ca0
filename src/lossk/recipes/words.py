"""A small lossless tokenizer: frequent words are tokens, everything else is spelled out in characters."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from lossk.checks import check_integer

# A word takes the space before it along, so that text is the plain concatenation of its tokens.
_PIECES = re.compile(r" ?[^\W\d_]+| ?\d| ?[^\w\s]|\s|_")


@dataclass(frozen=True)
class Words:
    """The tokens of one text, numbered by decreasing frequency, then by spelling."""

    tokens: tuple[str, ...]
    _numbers: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_numbers", {token: number for number, token in enumerate(self.tokens)})

    @classmethod
    def of(cls, text: str, *, at_least: int = 3) -> Words:
        """Every character of `text`, and every piece (a word with the space before it, say) seen `at_least` times."""
        check_integer("at_least", at_least, 1)
        if not text:
            raise ValueError("text must not be empty, got ''")
        found = Counter({piece: count for piece, count in Counter(_pieces(text)).items() if count >= at_least})
        found.update(dict.fromkeys(set(text), 0))
        return cls(tuple(sorted(found, key=lambda token: (-found[token], token))))

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Token numbers, whose tokens concatenate to `text`. Raises ValueError for a character that is no token."""
        numbers: list[int] = []
        for piece in _pieces(text):
            parts = [piece] if piece in self._numbers else list(piece)
            for part in parts:
                if part not in self._numbers:
                    raise ValueError(f"text must hold characters of the tokenizer's own text only, got {part!r}")
                numbers.append(self._numbers[part])
        return numbers


def _pieces(text: str) -> list[str]:
    pieces = _PIECES.findall(text)
    assert sum(map(len, pieces)) == len(text), "every character belongs to a piece"
    return pieces
