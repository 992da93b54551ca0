"""`lossk info`, `lossk verify` and `lossk export`: what can be done with a store."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lossk.available import gigabytes
from lossk.checks import check_path
from lossk.cli.options import named
from lossk.diagnostics.table import short
from lossk.errors import StoreError
from lossk.forms.names import Names
from lossk.kernel.from_store import open_kernel
from lossk.store.commits import progress_of
from lossk.store.manifest import is_complete


def run_info(options: argparse.Namespace) -> None:
    from lossk.report.summary import describe

    store = Path(options.store)
    try:
        kernel = open_kernel(store)
    except StoreError:
        if is_complete(store) or not (store / "config.json").exists():
            raise
        progress = progress_of(store)
        if options.json:
            print(json.dumps({"complete": False, "progress": progress}))
        else:
            print(f"{store}  unfinished: {progress}; lossk run {store.with_suffix('.yaml')} --resume continues it")
        return
    size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    if options.json:
        plain = {key: value for key, value in kernel.meta.items() if not key.endswith("_trace")}
        diagnostics = None if kernel.diagnostics is None else kernel.diagnostics.to_dict()
        shape = {"num_samples": kernel.num_samples, "num_chains": kernel.num_chains, "num_draws": kernel.num_draws}
        kind = {"tile": kernel.tile, "dtype": kernel.dtype, "centering": kernel.centering, "bytes": size}
        print(json.dumps({"complete": True, **shape, **kind, "diagnostics": diagnostics, **plain}, indent=1))
        return
    print(f"{store}  {gigabytes(size)}, complete")
    print(describe(kernel))
    print(f"{kernel.form:12s} side {kernel.tile}, {kernel.dtype}, centered by {kernel.centering}")
    if len(kernel.names):
        print(f"named        {describe_names(kernel.names)}")
    print("\n".join(describe_making(kernel.meta)))


def describe_names(names: Names) -> str:
    """Which names the rows have."""
    ids = [] if names.ids is None else [f"ids {names.ids[0]}, ..."]
    if names.labels is None:
        return ids[0]
    classes = len(names.class_names) or int(names.labels.max()) + 1
    return ", ".join([*ids, f"{classes:,} classes" + (f": {', '.join(names.class_names[:5])}, ..." if classes else "")])


def describe_making(meta: Mapping[str, Any]) -> list[str]:
    """The sampler, scales and versions of a run, numbers in 4 digits; a store of bare traces has none."""
    sampler = {key: value for key, value in meta.get("sampler", {}).items() if value is not None}
    lines = [f"  {key:22s} {short(value) if isinstance(value, float) else value}" for key, value in sampler.items()]
    lines = ["sampler", *lines] if lines else []
    lines += [f"  D of {name:17s} {short(scale)}" for name, scale in meta.get("scales", {}).items()]
    versions = ", ".join(f"{package} {version}" for package, version in (meta.get("versions") or {}).items())
    commit = meta.get("git_sha")
    made = ", ".join(filter(None, [versions, f"commit {commit[:12]}" if commit else ""]))
    return [*lines, f"made by      {made}"] if made else lines


def run_verify(options: argparse.Namespace) -> int:
    """Status 1 where anything is wrong."""
    from lossk.store.verify import verify_store

    found = verify_store(options.store)
    for check in found.checks:
        print(f"ok     {check}")
    for problem in found.problems:
        print(f"WRONG  {problem}")
    count = len(found.problems)
    print(f"{options.store}: {'whole and consistent' if found.ok else f'{count} problem' + 's' * (count > 1)}")
    return 0 if found.ok else 1


def run_export(options: argparse.Namespace) -> None:
    kernel, out = open_kernel(options.store), check_path("out", options.out)
    write: Any = kernel.to_memmap if options.format == "npy" else kernel.to_zarr
    named("out", partial(write, correlation=options.correlation), out)
    what = "correlations" if options.correlation else "covariances, nats^2"
    print(f"wrote {out}  {kernel.num_samples} x {kernel.num_samples} {what}, {gigabytes(4 * kernel.num_samples**2)}")
