"""Every Triton kernel in every configuration, compiled ahead of time for sm_80 (A100) and sm_90 (H100, H200).

    python -m bench.aot [--out docs/aot.md] [--workers 2] [--first]

Under the Triton that is installed, or another one: `make aot-with TRITON=FOLDER`, FOLDER a wheel of it unpacked.
Needs no GPU: Triton's wheel brings ptxas, and cuobjdump, which reads the registers, stack and shared memory of the
result. Fails if a configuration does not compile, spills (any stack or local memory; more than a little before Triton
3.6), or needs more shared memory than a block can have. It says nothing of speed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

# Shared memory a block can have, bytes (CUDA C++ Programming Guide, "Compute Capabilities").
SHARED = {80: 163 * 1024, 90: 227 * 1024}
MODULES = ("head_loss", "normals", "rank_update", "sample_loss", "sgld_step", "top_correlations")

SPILLED_BY_OLDER = 64  # bytes a thread that a Triton before 3.6 may spill: 3.4 does 48, in rank_update on sm_80

Case = tuple[str, int, int]  # module, index into its configs(), architecture


@dataclass(frozen=True)
class Resources:
    """What a compiled configuration takes."""

    module: str
    kernel: str
    config: str
    architecture: int
    registers: int  # per thread, of 255
    spills: int  # bytes of stack and local memory per thread
    shared: int  # bytes per block

    @property
    def fault(self) -> str:
        """What is wrong with it, or ""."""
        if self.spills > _most_spilled():
            return f"spills {self.spills} bytes"
        if self.shared > SHARED[self.architecture]:
            return f"needs {self.shared} bytes of shared memory, of {SHARED[self.architecture]}"
        return ""


def _most_spilled() -> int:
    import triton

    return SPILLED_BY_OLDER if triton.__version__.startswith(("3.4.", "3.5.")) else 0


def compile_case(case: Case) -> Resources:
    """Compile one configuration for one architecture."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lossk.ops.triton_kernels import find_kernels

    find_kernels()
    from lossk.kernels.launch import COMPILED_AS

    module, index, architecture = case
    config = importlib.import_module(f"lossk.kernels.{module}").configs()[index]
    names = config.kernel.arg_names
    types = dict(zip([n for n in names if n not in config.constants], config.types, strict=True))
    # As the launcher's tensors are, and as Triton then assumes: pointers on 16-byte borders.
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t.startswith("*")}
    constants = {(names.index(n),): value for n, value in config.constants.items()}
    source = ASTSource(config.kernel, types | dict.fromkeys(config.constants, "constexpr"), constants, aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **COMPILED_AS}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, spills = read_usage(compiled.asm["cubin"])
    name = config.kernel.__name__
    return Resources(module, name, config.label, architecture, registers, spills, compiled.metadata.shared)


def read_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of a cubin's one kernel, per thread."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    assert found, told
    return int(found[1]), int(found[2]) + int(found[3])


def cases() -> list[Case]:
    """Every configuration for every architecture."""
    import importlib

    from lossk.ops.triton_kernels import find_kernels

    find_kernels()
    counts = {module: len(importlib.import_module(f"lossk.kernels.{module}").configs()) for module in MODULES}
    return [(module, i, arch) for module, count in counts.items() for i in range(count) for arch in SHARED]


def first_cases() -> list[Case]:
    """The first configuration of every module, for the newest architecture."""
    return [(module, 0, max(SHARED)) for module in MODULES]


def sources_digest() -> str:
    """SHA-256 of the kernels' files, which hold all that `cases` compiles: a page of other files is out of date."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).resolve().parents[1] / "kernels").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def table(results: list[Resources]) -> Iterator[str]:
    """Markdown: a row per configuration, sm_80 and sm_90 beside each other."""
    heads = [f"{what} sm_{arch}" for what in ("registers", "spills", "shared, bytes,") for arch in SHARED]
    yield "| kernel | configuration | " + " | ".join(heads) + " |"
    yield "|---|---" + "|---:" * len(heads) + "|"
    grouped: dict[tuple[str, str], list[Resources]] = {}
    for result in results:
        grouped.setdefault((result.kernel, result.config), []).append(result)
    for (kernel, config), pair in grouped.items():
        cells = [getattr(r, what) for what in ("registers", "spills", "shared") for r in pair]
        yield f"| `{kernel}` | {config} | " + " | ".join(f"{cell:,}" for cell in cells) + " |"


PREFACE = """# The Triton kernels, compiled ahead of time

Written by `python -m bench.aot --out docs/aot.md`, which fails if a configuration does not compile, spills, or needs
more shared memory than a block has ({shared80:,} bytes on sm_80, {shared90:,} on sm_90). Triton {triton} and the ptxas
in its wheel; registers are per thread, of 255; spills are bytes of stack and local memory per thread. SHA-256 of
kernels/*.py: `{digest}`.

**No GPU was at hand.** The kernels' numbers are tested in Triton's interpreter only; block shapes are the largest tried
that spill nothing, not tuned ones; no speed is claimed. Pointers are taken to lie on 16-byte borders; for others Triton
compiles variants with narrower loads at run time, which are not in this table.
"""


def page(results: list[Resources]) -> str:
    """docs/aot.md."""
    import triton

    shared = {f"shared{arch}": most for arch, most in SHARED.items()}
    preface = PREFACE.format(**shared, triton=triton.__version__, digest=sources_digest())
    return "\n".join([preface, *table(results), ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table there, as Markdown")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--first", action="store_true", help="only the first of each module's, for sm_90")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("bench.aot: unset TRITON_INTERPRET: an interpreted kernel cannot be compiled", file=sys.stderr)
        return 2
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compile_case, first_cases() if options.first else cases()))
    print("\n".join(table(results)))
    if options.out is not None:
        options.out.write_text(page(results))
    faults = [f"{r.kernel}, {r.config}, sm_{r.architecture}: {r.fault}" for r in results if r.fault]
    spilled = sum(result.spills > 0 for result in results)
    print("\n".join(faults) if faults else f"{len(results)} compiled, {spilled or 'none'} spill", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
