"""Optional packages: imported where they are used, with one error that names the extra to install."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from lossk.errors import MissingPackageError


def require(module: str, extra: str, what: str = "this", *, package: str | None = None) -> Any:
    """Import a module of an optional package.

    Args:
        module: its dotted name.
        extra: of lossk, that installs it.
        what: needs it, as the error says.
        package: what its distribution is called, where that is not what is imported.

    Raises:
        MissingPackageError: it is not installed.
        ImportError: it is, but something that it needs is not.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        raise _missing(package or top, extra, what) from error


def check_installed(module: str, extra: str, what: str, *, package: str | None = None) -> None:
    """As `require`, before long work: the module is looked for and not imported, which can take seconds."""
    if importlib.util.find_spec(module) is None:
        raise _missing(package or module, extra, what)


def _missing(package: str, extra: str, what: str) -> MissingPackageError:
    return MissingPackageError(f'{what} needs {package}: pip install "lossk[{extra}]"')
