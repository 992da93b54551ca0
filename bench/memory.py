"""Peak memory of a kernel against its budget, 2 N^2 bytes + 300 MB, and against devinterp 2.0.1's sequence kernel.

python -m bench.memory [--quick] [--peer2-python PYTHON] [--set peer_samples=8000]
"""

from __future__ import annotations

from bench.markdown import megabytes, seconds, table
from bench.one_build import Point, elsewhere
from bench.options import Found, Options, run_alone
from bench.peers import Peer

SPARE = 300e6  # bytes beside the float32 triangle of 2 N^2


def measure(options: Options) -> Found:
    sizes = options.pick(full=(8000, 20_000), quick=(2000, 8000), tiny=(200,))
    points = [Point(num_samples=size, threads=options.threads) for size in sizes]
    ours = [{"num_samples": point.num_samples, **elsewhere(point)} for point in points]
    return {"ours": ours, "peer": measure_peer(options) if options.peer2_python else []}


def measure_peer(options: Options) -> list[Found]:
    """devinterp's sequence kernel of as many draws, from traces already in memory: that its chains are left out."""
    sizes = sorted({2000, options.changes.get("peer_samples", 2000)})
    point = Point(num_samples=0)
    found = []
    for size in sizes:
        for covariance in (True, False):
            spec = {"what": "kernel", "num_samples": size, "covariance": covariance, "threads": options.threads}
            draws = {"num_chains": point.num_chains, "num_draws": point.num_draws}
            with Peer(options.peer2_python or "", "bench.peer2", {**spec, **draws}) as peer:
                found.append({**spec, **peer.turn()})
    return found


def section(found: Found) -> str:
    rows = [row("lossk: build_kernel", each, each["timings"]["total"]) for each in found["ours"]]
    names = {True: "devinterp 2.0.1: covariance", False: "devinterp 2.0.1: correlation"}
    rows += [row(names[each["covariance"]], each, each["seconds"]) for each in found["peer"]]
    head = ["", "N", "peak above the start", "per N^2", "budget", "within", "time"]
    return "\n\n".join(["## Peak memory", table(head, rows), HOW])


def row(name: str, found: Found, taken: float) -> list[str]:
    squared = found["num_samples"] ** 2
    budget = 2 * squared + SPARE
    return [
        name,
        f"{found['num_samples']:,}",
        megabytes(found["above"]),
        f"{found['above'] / squared:.3g} bytes",
        megabytes(budget),
        "yes" if found["above"] <= budget else "**no**",
        seconds(taken),
    ]


HOW = """Resident memory of a process of its own: its peak above what it held with model and data loaded, before the
call. The budget is the float32 triangle, 2 N^2 bytes, and 300 MB. lossk's figure covers the whole of `build_kernel`
(2 chains x 16 draws of a small MLP; what it loads on first use counts), devinterp's only its kernel, `compute_bif` with
`correlation_method="sequence"`, of as many draws that are in memory already: covariance, which is what lossk forms, and
correlation, which is its default."""


if __name__ == "__main__":
    run_alone(measure, section, __doc__)
