"""Optional packages: imported where they are used, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import a module of an optional package.

    Raises:
        ImportError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # it is there, but something that it needs is not
        raise ImportError(f"{package} is needed here and not installed: pip install 'lossk[{extra}]'") from error
