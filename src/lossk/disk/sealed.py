"""JSON that says whether it is what was written: a description, or a log line by line, each with a checksum in itself.

The last member of an object is `"crc32c"`, of the bytes before it. In a log it goes on from the line before: so lines
that are changed, lost, doubled or in another order are found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lossk.disk.files import JSON_BYTES, append_file, digest, extend_crc, parse_json, read_file, replace_file, to_json
from lossk.errors import StoreError

LINE = re.compile(rb', "crc32c": "([0-9a-f]{8})"\}\Z')
OBJECT = re.compile(rb',\n "crc32c": "([0-9a-f]{8})"\n\}\n\Z')
MARK = "checksums"  # the member of a store's config.json that says that it has them
LOG_BYTES = 2**30  # of a log of commits or tiles: 200 bytes a draw, or 50 a tile


# --- one object ----------------------------------------------------------------------------------------------------


def seal(path: Path, content: dict[str, Any]) -> bytes:
    """The text of a JSON file with its checksum."""
    body = to_json(path, {key: value for key, value in content.items() if key != "crc32c"}).removesuffix(b"\n}\n")
    return body + b',\n "crc32c": "%08x"\n}\n' % digest(body)[1]


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file, with its checksum, in one step, durably."""
    replace_file(path, seal(path, content))


def read_sealed(path: Path) -> dict[str, Any]:
    """The object in a JSON file, without its checksum, if it has one.

    Raises:
        StoreError: it is missing, is not what was written, or is no object.
    """
    what = f"{path.name} of {str(path.parent)!r}"
    try:
        content = read_file(path, JSON_BYTES)
    except FileNotFoundError as error:
        raise StoreError(f"{what} is missing") from error
    found = parse_json(content, what)
    if not isinstance(found, dict):
        raise StoreError(f"{what} cannot be read: it holds no object")
    end = OBJECT.search(content)
    if end is not None and digest(content[: end.start()])[1] != int(end[1], 16):
        raise StoreError(f"{what} is damaged: it does not fit its checksum")
    if end is None and {"crc32c", MARK} & set(found):
        raise StoreError(f"{what} is damaged: its checksum is missing")
    return {key: value for key, value in found.items() if key != "crc32c"}


# --- a log ---------------------------------------------------------------------------------------------------------


class LineLog:
    """A log that is written: each line durable before the next."""

    def __init__(self, path: Path, last: int = 0) -> None:
        self.path, self._last = path, last

    @classmethod
    def begin(cls, path: Path, lines: Sequence[Any]) -> LineLog:
        """A log of these lines, in place of what is there, in one step."""
        log = cls(path)
        replace_file(path, log._encode(lines))
        return log

    @classmethod
    def after(cls, path: Path, lines: Sequence[Any]) -> LineLog:
        """The log that `begin` has written with these lines."""
        log = cls(path)
        log._encode(lines)
        return log

    def append(self, lines: Sequence[Any]) -> None:
        """Add lines, objects that are not empty, in one write."""
        append_file(self.path, self._encode(lines))

    def _encode(self, lines: Sequence[Any]) -> bytes:
        text = b""
        for line in lines:
            body = json.dumps(line).encode().removesuffix(b"}")
            self._last = extend_crc(self._last, body)
            text += body + b', "crc32c": "%08x"}\n' % self._last
        return text


def read_log(path: Path, *, sealed: bool) -> tuple[list[dict[str, Any]], str | None]:
    """The lines of a log, none where there is none, and what is wrong with its last line, if that is not read.

    What a kill, or a loss of power, cut off at its end is no line: what it would have said is done again.

    Args:
        sealed: every line has a checksum. A log of an earlier version has none.

    Raises:
        StoreError: a line before the last one is not what was written; named by its number.
    """
    try:
        content = read_file(path, LOG_BYTES)
    except FileNotFoundError:
        return [], None
    found: list[dict[str, Any]] = []
    last, lines = 0, content.split(b"\n")[:-1]  # every whole line ends in a newline
    for number, line in enumerate(lines, 1):
        what = f"{path.name} of {str(path.parent)!r}, line {number},"
        try:
            end = LINE.search(line)
            body = line if end is None else line[: end.start()]
            if sealed and end is None:
                raise StoreError(f"{what} is damaged: its checksum is missing")
            if end is not None and extend_crc(last, body) != int(end[1], 16):
                raise StoreError(f"{what} is damaged, or not the one that was written there")
            plain = parse_json(line, what)
        except StoreError as error:
            if number == len(lines):
                return found, str(error)
            raise
        if isinstance(plain, dict):
            plain.pop("crc32c", None)
        last = last if end is None else int(end[1], 16)
        found.append(plain)
    return found, None
