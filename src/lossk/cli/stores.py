"""`lossk info`, `lossk verify` and `lossk export`: what can be done with a store."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from lossk.available import gigabytes
from lossk.checks import check_path
from lossk.cli.options import file_path, folder, named
from lossk.errors import StoreError
from lossk.kernel.from_store import open_kernel
from lossk.store.commits import progress_of
from lossk.store.manifest import is_complete


def add_commands(commands: Any) -> None:
    """Add them to the parser's subcommands."""
    info = commands.add_parser("info", help="what a store holds")
    info.add_argument("store", type=folder)
    info.add_argument("--json", action="store_true", help="everything, as JSON")
    info.set_defaults(run=run_info)

    verify = commands.add_parser("verify", help="check every checksum of a store, and that it can be a kernel")
    verify.add_argument("store", type=folder)
    verify.set_defaults(run=run_verify)

    export = commands.add_parser("export", help="write the whole N x N matrix for other tools")
    export.add_argument("store", type=folder)
    export.add_argument("out", type=file_path, help="path to write, which must not exist")
    export.add_argument("--format", choices=("zarr", "npy"), default="zarr", help="default: zarr")
    export.add_argument("--correlation", action="store_true", help="R instead of K")
    export.set_defaults(run=run_export)


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
    for key, value in kernel.meta.get("sampler", {}).items():
        print(f"  {key:20s} {value}")
    for name, scale in kernel.meta.get("scales", {}).items():
        print(f"  D of {name:15s} {scale:.4g}")
    print(f"made by      {kernel.meta.get('versions', {})}, commit {kernel.meta.get('git_sha')}")


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
