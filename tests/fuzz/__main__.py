"""`python -m tests.fuzz`: every value for every argument; counts by group, and the list of what is not clear.

python -m tests.fuzz                    everything, some minutes
python -m tests.fuzz --only analysis    names that contain a text
python -m tests.fuzz --json FILE        the counts, and every offender
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")


def main() -> int:
    """Status 1 where any call was refused without its argument's name, obscurely or not at all."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="names of callables that contain it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write counts and offenders")
    parser.add_argument("--verbose", action="store_true", help="every outcome")
    options = parser.parse_args()
    import torch

    from .catalog import broken, catalog, everything, seed_streams, unknown
    from .judge import CLASSES, FAULTS
    from .memory import limit_memory

    torch.set_num_threads(1)
    target = None if options.json is None else options.json.resolve()
    counts: dict[str, Counter[str]] = {}
    offenders = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as working:
        os.chdir(working)
        entries = catalog(Path(folder))
        missing, gone = unknown(entries)
        for name in missing:
            print(f"no valid call is known for {name}")
        for name in gone:
            print(f"not public: {name}")
        for name, why in broken(entries).items():
            print(f"the valid call of {name} fails: {why}")
        chosen = {name: entry for name, entry in entries.items() if options.only in name}
        limit_memory()
        seed_streams()
        for found in everything(chosen):
            counts.setdefault(found.entry.group, Counter())[found.kind] += 1
            if found.kind in FAULTS or options.verbose:
                offenders.append([found.kind, found.entry.name, found.parameter, found.value, found.detail])
                print(
                    f"{found.kind:8s} {found.entry.name}({found.parameter}={found.value})  {found.detail}", flush=True
                )
        os.chdir("/")
    print(table(counts, CLASSES))
    if target is not None:
        target.write_text(json.dumps({"counts": counts, "offenders": offenders}, indent=1))
    return int(any(count[kind] for count in counts.values() for kind in FAULTS))


def table(counts: dict[str, Counter[str]], classes: tuple[str, ...]) -> str:
    """Markdown: a row for each group, and their sum."""
    rows = {**counts, "all": sum(counts.values(), Counter())}
    lines = [f"| group | calls | {' | '.join(classes)} |", f"|---|{'--:|' * (len(classes) + 1)}"]
    for group, count in rows.items():
        numbers = [sum(count.values()), *(count[kind] for kind in classes)]
        lines.append(f"| {group} | {' | '.join(f'{number:,}' for number in numbers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
