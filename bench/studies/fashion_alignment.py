"""Fashion-MNIST's classes in a loss kernel and in WordNet, beside what needs no sampling.

    python -m bench.studies.fashion_alignment --config RUN.yaml --out docs/fashion_alignment.md

RUN.yaml is what `lossk run fashion` leaves beside its store: it names the network, the images and the store itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from bench.machine import described
from lossk import provenance
from lossk.analysis import ClassMatrix, align, class_similarity, dendrogram, wordnet_taxonomy
from lossk.analysis.alignment import Alignment
from lossk.analysis.baselines import confusion, gradient_cosine, penultimate_features, raw_inputs
from lossk.analysis.stored_traces import open_with_chains
from lossk.analysis.wordnet import FASHION_SYNSETS
from lossk.cli.config import load_config
from lossk.kernel.kernel import LossKernel
from lossk.recipes import RecipeTask

PARTS = {"bag | rest": [int(name == "Bag") for name in FASHION_SYNSETS]}
PARTS["clothing | footwear | bag"] = [
    2 if name == "Bag" else int(name in ("Sandal", "Sneaker", "Ankle boot")) for name in FASHION_SYNSETS
]
CONTROLS = ("raw pixels", "penultimate features", "confusion")


def similarities(kernel: LossKernel, task: RecipeTask) -> dict[str, ClassMatrix]:
    """Every row of the table: the kernel's means, and the baselines'."""
    assert task.labels is not None
    names = list(task.class_names)
    of_kernel = class_similarity(kernel, task.labels, names)
    found = {"loss kernel, mean R": of_kernel.signed, "loss kernel, mean |R|": of_kernel.absolute}
    gradients = gradient_cosine(task.model, task.samples)
    features = {
        "raw pixels": raw_inputs(task.samples, centred=True),
        "penultimate features": penultimate_features(task.model, task.samples, centred=True),
        "gradient cosine": gradients,
    }
    found |= {name: class_similarity(source, task.labels, names).signed for name, source in features.items()}
    found["gradient |cosine|"] = class_similarity(gradients, task.labels, names).absolute
    _, called = confusion(task.model, task.samples, soft=True)
    found["confusion"] = ClassMatrix((called + called.T).numpy() / 2)
    return found


def page(found: Mapping[str, ClassMatrix], alignment: Alignment, kernel: LossKernel, command: str) -> str:
    """The Markdown page."""
    first = next(iter(found))
    upper = np.triu_indices(alignment.num_classes, 1)
    names = list(FASHION_SYNSETS)
    order = np.argsort(found[first].matrix[upper])
    error = found[first].image_error

    def pair(at: int) -> str:
        i, j = upper[0][at], upper[1][at]
        return f"{names[i]} / {names[j]} {found[first].matrix[i, j]:+.3f}" + (
            f" ± {error[i, j]:.3f}" if error is not None else ""
        )

    verdict = "" if kernel.diagnostics is None else f"; verdict of its chains: {kernel.diagnostics.verdict}"
    tree = dendrogram(found[first], names)
    lines = [
        "# Fashion-MNIST: do the kernel's classes lie as WordNet has them?",
        "",
        f"`{command}`; {kernel!r}{verdict}. {alignment.note}",
        "",
        "Each cell: value ± standard error over images, then over chains (where there are any). Synsets are those of "
        "`lossk.analysis.wordnet.FASHION_SYNSETS`, in WordNet 3.0. Pixels and features are centered about their mean.",
    ]
    for measure in ("wu_palmer", "path", "lin"):
        lines += [
            "",
            f"## {measure}",
            "",
            alignment.markdown(measure, ["spearman", "kendall", "triplets", "cophenetic"]),
        ]
    lines += ["", "## What is left when the rest is held fixed (Wu-Palmer, partial Mantel)", ""]
    lines.append(alignment.markdown("wu_palmer", ["partial", *(f"partial | {name}" for name in CONTROLS)]))
    for partition in PARTS:
        escaped = partition.replace("|", "\\|")
        lines += ["", f"## Partition {escaped}", "", alignment.markdown(partition, ["purity", "nmi", "ari"])]
    lines += ["", "## Signs", "", f"Highest mean R: {'; '.join(pair(a) for a in order[::-1][:4])}.", ""]
    lines.append(f"Lowest: {'; '.join(pair(a) for a in order[:4])}.")
    lines += ["", f"The dendrogram of mean R has cophenetic correlation {tree.cophenetic_correlation:.2f}."]
    lines += ["", f"{described(provenance.versions())}; git {provenance.git_sha()}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML beside the store of a run of the fashion recipe")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(options.config)
    kernel, task = open_with_chains(config.out), config.make_task()
    found = similarities(kernel, task)
    controls = {name: found[name] for name in CONTROLS}
    alignment = align(found, wordnet_taxonomy(FASHION_SYNSETS), controls=controls, partitions=PARTS)
    command = "python -m bench.studies.fashion_alignment --config RUN.yaml --out docs/fashion_alignment.md"
    options.out.write_text(page(found, alignment, kernel, command), encoding="utf-8")
    print(options.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
