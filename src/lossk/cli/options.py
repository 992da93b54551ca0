"""Options of the command line: read and checked as they are parsed, so that an error names the option, in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

Found = TypeVar("Found")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others of the command line are."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which takes `--option=--` for an empty list."""
        for text in sys.argv[1:] if args is None else args:
            if text.startswith("--") and text.endswith("=--"):
                self.error(f"argument {text.removesuffix('=--')}: must not be '--'")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Status 2 for what is no command; a value that breaks its option's rule is an error as any other.

        Raises:
            ValueError: such a value, naming the option and the rule.
        """
        option, broken, rule = message.removeprefix("argument ").partition(": must ")
        if broken:
            raise ValueError(f"{option} must {rule}")
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def whole(least: int, most: int | None = None, **more: int) -> Callable[[str], int]:
    """A whole number within bounds; `more` as in `check_integer`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, got {_shown(text)}") from None
        return _named("check_integer", number, least, most, **more)

    return read


def real(least: float, most: float) -> Callable[[str], float]:
    """A number within bounds."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {_shown(text)}") from None
        return _named("check_number", number, least=least, most=most)

    return read


def folder(text: str) -> str:
    """The path of a folder, the current one and the root too."""
    _named("check_place", text)
    return text


def file_path(text: str) -> str:
    """The path of a file or of a folder; whether it is there is asked by whoever opens it."""
    _named("check_path", text)
    return text


def store_path(text: str) -> str:
    """The path of a store to write."""
    if _named("check_path", text).suffix != ".lossk":
        raise argparse.ArgumentTypeError(f"must end in .lossk, got {_shown(text)}")
    return text


def existing(text: str) -> str:
    """The path of a file that is there."""
    if not _named("check_path", text).is_file():
        raise argparse.ArgumentTypeError(f"must be a file that is there, got {_shown(text)}")
    return text


def _shown(text: str) -> str:
    from lossk.checks import shown

    return shown(text)


def _named(check: str, value: Any, *rules: Any, **more: Any) -> Any:
    """A check of `lossk.checks`, which imports torch; argparse writes the option's name before the message."""
    from lossk import checks

    try:
        return getattr(checks, check)("", value, *rules, **more)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from None


def named(option: str, read: Callable[..., Found], *arguments: Any) -> Found:
    """What `read(*arguments)` returns; where it refuses what it reads, the error begins with the option.

    Raises:
        ValueError: what the option names cannot be read.
    """
    try:
        return read(*arguments)
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise ValueError(f"{option}: {error}") from error
