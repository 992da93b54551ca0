"""The command line: a thin shell over the library. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import lossk
from lossk.cli.arguments import add_commands
from lossk.cli.options import Parser
from lossk.errors import LosskError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Exit status: 0 done, 1 a store that fails `verify`, 2 a clear error (one line on stderr),
    130 interrupted."""
    options = argparse.Namespace(debug=False)
    try:
        options = build_parser().parse_args(arguments)
        return _run(options)
    except KeyboardInterrupt:
        print("lossk: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, MemoryError, LosskError, ModuleNotFoundError) as error:
        if options.debug:
            raise
        print(f"lossk: {_rank()}{' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from lossk.run.allocation import shortage_named

    with shortage_named():
        return options.run(options) or 0


def _rank() -> str:
    """Which rank of torchrun's this is, where it is one."""
    if "RANK" not in os.environ:
        return ""
    from lossk.ranks.distributed import rank_name

    return rank_name()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="lossk",
        description=lossk.__doc__.splitlines()[0] if lossk.__doc__ else None,
        epilog="example: lossk demo --out /tmp/demo; `lossk COMMAND --help` shows what a command takes",
    )
    parser.add_argument("--version", action="version", version=f"lossk {lossk.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_commands(parser.add_subparsers(required=True, metavar="COMMAND"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
