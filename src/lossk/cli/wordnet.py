"""What `lossk run` says and draws of a task whose classes are nouns of WordNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lossk.kernel.kernel import LossKernel
from lossk.kernel.neighbors import Neighbors


def wordnet_picture(out: Path) -> Path:
    """Where a run shows its map colored by WordNet."""
    return out.with_suffix(".wordnet.png")


def show_wordnet(
    kernel: LossKernel,
    labels: Tensor,
    class_names: Sequence[str],
    synsets: Sequence[str],
    neighbors: Neighbors,
    out: Path,
) -> Path:
    """Print the alignment of the kernel in `out` with WordNet, draw its map, and return the picture's path."""
    from lossk.analysis.stored_traces import open_with_chains
    from lossk.report.taxonomy_summary import describe_taxonomy, wordnet_classes, write_taxonomy_map

    classes = wordnet_classes(labels, class_names, synsets)
    print(describe_taxonomy(open_with_chains(out), classes, neighbors))
    write_taxonomy_map(kernel, classes, wordnet_picture(out), "Loss kernel map")
    return wordnet_picture(out)
