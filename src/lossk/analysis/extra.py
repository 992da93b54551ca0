"""Packages of the optional extra `lossk[analysis]`, asked for only by what needs them."""

from __future__ import annotations

import importlib.util

from lossk.errors import LosskError


def require(module: str, package: str, what: str) -> None:
    """Raise LosskError, with what to install, unless `module` can be imported."""
    if importlib.util.find_spec(module) is None:
        raise LosskError(f'{what} needs {package}: pip install "lossk[analysis]"')
