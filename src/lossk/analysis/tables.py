"""Results as tables on disk, by the file's extension."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lossk.optional import check_installed

TABLES = (".parquet", ".csv")
PICTURES = (".png",)


def check_outputs(paths: Sequence[Path], suffixes: Sequence[str], *, overwrite: bool) -> None:
    """Refuse, before any work, what could not be written after it.

    Raises:
        ValueError: another extension than `suffixes`.
        FileExistsError: one exists, unless `overwrite`.
    """
    for path in paths:
        if path.suffix not in suffixes:
            raise ValueError(f"--out must end in {', '.join(suffixes)}, got {str(path)!r}")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{str(path)!r} exists; pass --overwrite to replace it")
        if path.suffix in TABLES:
            check_installed("pandas", "analysis", "a table")
        if path.suffix == ".parquet":
            check_installed("pyarrow", "analysis", "a Parquet file")
        if path.suffix in PICTURES:
            check_installed("matplotlib", "analysis", "a picture")


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_FORMULA = re.compile(
    r"'*\s*[=+\-@\uff0b\uff0d\uff1d\uff20]|'*[\t\r\n]"
)  # what a spreadsheet computes; also at full width


def safe_cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula, after a `'`, which makes it text; all else as it is.

    Names of classes and samples come from elsewhere, and may run what they like once a table is opened. Numbers stay.
    """
    if not isinstance(value, str):
        return value
    if "\r" in value:  # ends a row, as pandas does not quote it; what follows would begin a cell of its own
        value = value.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{value}" if _FORMULA.match(value) and not _NUMBER.fullmatch(value) else value


def plain_cell(text: str) -> str:
    """The text that `safe_cell` wrote."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def write_csv(frame: Any, path: Path) -> None:
    """A pandas frame as CSV, without its index; no cell nor heading is a formula."""
    safe = frame.copy(deep=False)
    for name in safe.columns:
        if safe[name].dtype.kind not in "biufc":  # neither numbers nor truth values
            safe[name] = [safe_cell(value) for value in safe[name]]
    safe.columns = [safe_cell(name) for name in safe.columns]
    safe.to_csv(path, index=False)


def write_table(columns: Mapping[str, Any], path: Path) -> None:
    """Write equally long columns (tensors, arrays or lists) as Parquet or CSV. Needs lossk[analysis]."""
    import pandas

    plain = {name: v.numpy() if isinstance(v, Tensor) else np.asarray(v) for name, v in columns.items()}
    frame = pandas.DataFrame(plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        write_csv(frame, path)
