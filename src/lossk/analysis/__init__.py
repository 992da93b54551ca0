"""What a finished kernel says about the data. Reads a kernel, or arrays taken from one; never samples.

Names are imported when they are asked for, so that `import lossk` needs none of the packages behind them.
"""

from __future__ import annotations

import importlib
from typing import Any

MODULES = {
    "neighbors": ("SignificantNeighbors", "significant_neighbors"),
    "maps": ("Clusters", "KernelMap", "cluster", "map_kernel"),
    "spectrum": ("EigenSamples", "Spectrum"),  # `spectrum` itself would be the module: lossk.analysis.spectrum.spectrum
    "class_matrix": ("ClassMatrix",),
    "hierarchy": ("ClassSimilarity", "Dendrogram", "class_similarity", "dendrogram"),
    "taxonomy": ("Taxonomy",),
    "wordnet": ("wordnet_taxonomy",),
    "mantel": ("Mantel",),
    "alignment": ("Alignment", "align", "triplet_agreement"),
    "compare": ("Comparison", "compare_kernels"),
}
WHERE = {name: module for module, names in MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *WHERE})
