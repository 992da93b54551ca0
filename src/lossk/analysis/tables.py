"""Results as tables on disk, by the file's extension."""

from __future__ import annotations

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


def write_table(columns: Mapping[str, Any], path: Path) -> None:
    """Write equally long columns (tensors, arrays or lists) as Parquet or CSV. Needs lossk[analysis]."""
    import pandas

    plain = {name: v.numpy() if isinstance(v, Tensor) else np.asarray(v) for name, v in columns.items()}
    frame = pandas.DataFrame(plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        frame.to_csv(path, index=False)
