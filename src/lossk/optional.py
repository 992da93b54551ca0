"""Packages that are imported where they are used, with one error that says what to install.

Those of an extra, and those that only a store or a diagnosis needs: pip brings the latter with lossk. A source folder
on a machine without a package registry goes as far as it can without them, and a call says so at its beginning.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from lossk.errors import MissingPackageError

STORE = {"numcodecs": "numcodecs", "google_crc32c": "google-crc32c"}  # modules and their packages


def require(module: str, extra: str | None, what: str = "this", *, package: str | None = None) -> Any:
    """Import a module of an optional package.

    Args:
        module: its dotted name.
        extra: of lossk, that installs it; None: lossk itself does.
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


def check_run(*, stored: bool) -> None:
    """Before a run: what its diagnosis, and its store, will need at its end.

    Raises:
        MissingPackageError: naming what is not installed.
    """
    check_installed("arviz_stats", None, "the diagnosis of a run", package="arviz-stats")
    for module, package in STORE.items() if stored else ():
        check_installed(module, None, "a store", package=package)


def check_installed(module: str, extra: str | None, what: str, *, package: str | None = None) -> None:
    """As `require`, before long work: the module is looked for and not imported, which can take seconds."""
    if importlib.util.find_spec(module) is None:
        raise _missing(package or module, extra, what)


def _missing(package: str, extra: str | None, what: str) -> MissingPackageError:
    how = package if extra is None else f'"lossk[{extra}]"'
    return MissingPackageError(f"{what} needs {package}: pip install {how}")
