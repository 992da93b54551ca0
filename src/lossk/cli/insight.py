"""`lossk neighbors`, `lossk map`, `lossk hierarchy` and `lossk compare`: what a store says about its samples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from lossk.analysis.tables import PICTURES, TABLES, check_outputs, write_table
from lossk.checks import check_integer
from lossk.cli.class_labels import labeled, names_of_classes, open_named, read_taxonomy
from lossk.cli.options import named
from lossk.kernel.from_store import open_kernel
from lossk.kernel.indexing import resolve

SHOWN = 5  # pairs of classes that are printed, of either kind


def _outputs(options: argparse.Namespace, suffixes: tuple[str, ...]) -> list[Path]:
    paths = [Path(each) for each in options.out]
    check_outputs(paths, suffixes, overwrite=options.overwrite)
    return paths


def _wrote(paths: list[Path]) -> None:
    if paths:
        print("wrote " + ", ".join(map(str, paths)))


def run_neighbors(options: argparse.Namespace) -> None:
    from lossk.analysis import significant_neighbors

    paths, kernel = _outputs(options, TABLES), open_named(options)
    check_integer("--k", options.k, 1, len(kernel) - 1, limit=f"N - 1 = {len(kernel) - 1}")
    if options.rows is not None:
        resolve(options.rows, len(kernel), "--rows")
    found = significant_neighbors(kernel, options.k, options.rows, options.anti)
    rows, k = found.index.shape
    print(f"{rows:,} samples, {k} {'most anti-correlated' if options.anti else 'nearest'} of each")
    print(f"significant   {found.share:.1%} above the noise floor (unrelated samples: about {1 / k:.0%})")
    how = {
        "rows": "every sample's own losses",
        "watched": "the watched samples' losses",
        "lag1": "lag-1 autocorrelations",
    }
    print(f"noise floor   by {how[found.null]}, median R = {float(found.noise_floor.median()):.3f}")
    sure = float((found.by_chance < 0.01).double().mean())
    print(f"by_chance     {sure:.1%} are such as fewer than one row of a hundred would show by chance")
    kept = float((found.table_false_share <= 0.05).double().mean())
    print(f"discoveries   {kept:.1%}, at most 5% of them false (Benjamini and Hochberg, over the table)")
    if options.show:
        print(f"\n{'sample':>12s}  floor  nearest, with R; * stands above the sample's noise floor")
    for sample, floor, near in found.lines(options.show):
        print(f"{sample:>12s}  {floor}  {near}")
    if len(found.rows) > options.show > 0:
        print(f"... {len(found.rows) - options.show:,} more samples: --show N prints N, --out writes all")
    for target in paths:
        write_table(found.columns(), target)
    _wrote(paths)


def run_map(options: argparse.Namespace) -> None:
    from lossk.analysis import cluster, map_kernel

    paths, kernel = _outputs(options, TABLES + PICTURES), open_named(options)
    labels, names = kernel.labels, names_of_classes(kernel)
    drawn = map_kernel(
        kernel,
        dimensions=options.dimensions,
        num_neighbors=options.num_neighbors,
        min_dist=options.min_dist,
        seed=options.seed,
    )
    found = cluster(drawn, min_cluster_size=options.min_cluster_size, labels=labels)
    print(f"{kernel.num_samples:,} samples on the map, {int(drawn.dead.sum()):,} dead ones set aside")
    print(f"{found.num_clusters} clusters; {int((found.labels < 0).sum()):,} samples in none")
    if found.composition is not None and found.classes is not None:
        for number, counts in enumerate(found.composition.tolist()):
            where = "no cluster" if number == found.num_clusters else f"cluster {number}"
            parts = sorted(zip(counts, found.classes.tolist(), strict=True), reverse=True)
            print(f"  {where:10s} {sum(counts):6,}  " + ", ".join(f"{names[c]} {n:,}" for n, c in parts[:5] if n))
    for target in paths:
        if target.suffix in PICTURES:
            from lossk.report.class_picture import draw_map

            shown = found.labels if labels is None else labels
            legend = [f"cluster {i}" for i in range(found.num_clusters)] if labels is None else names
            draw_map(drawn, target, labels=shown.numpy(), names=legend, title=Path(options.store).stem)
            continue
        axes = {f"x{i}": drawn.coordinates[:, i] for i in range(options.dimensions)}
        table: dict[str, Any] = {"sample": np.arange(len(kernel)), **axes, "cluster": found.labels}
        table |= {"membership": found.probability, "dead": drawn.dead, "mean_loss": kernel.mean_loss}
        write_table(table | ({} if labels is None else {"label": [names[i] for i in labels.tolist()]}), target)
    _wrote(paths)


def run_hierarchy(options: argparse.Namespace) -> None:
    from lossk.analysis import align, class_similarity, dendrogram
    from lossk.analysis.stored_traces import open_with_chains

    paths = _outputs(options, TABLES + PICTURES)
    kernel = labeled(open_with_chains(options.store), options)
    labels, names = kernel.labels, names_of_classes(kernel)
    if labels is None:
        raise ValueError(f"--labels must be given: the store {options.store!r} keeps none, got None")
    taxonomy = None if options.taxonomy is None else named("--taxonomy", read_taxonomy, options.taxonomy, names)
    found = class_similarity(kernel, labels, names, seed=options.seed, progress=len(kernel) > 10_000)
    shown = found.absolute if options.absolute else found.signed
    tree = dendrogram(shown, names)
    print(f"{len(names)} classes, {int(found.counts.sum()):,} live samples")
    print(f"dendrogram's cophenetic correlation {tree.cophenetic_correlation:.3f}")
    for line in describe_pairs(shown, names):
        print(line)
    tables = [target for target in paths if target.suffix in TABLES]
    if taxonomy is not None:
        alignment = align({"mean R": found.signed, "mean |R|": found.absolute}, taxonomy, seed=options.seed)
        print(alignment.note)
        for measure in ("wu_palmer", "path", "lin"):
            print(f"\n{measure}\n" + alignment.markdown(measure, ["spearman", "kendall", "triplets", "cophenetic"]))
        records = alignment.records()
        for target in tables:
            write_table({key: [record[key] for record in records] for key in records[0]}, target)
    else:
        first, second = np.triu_indices(len(names))
        image, chain = shown.image_error, shown.chain_error
        blank = np.full(len(first), np.nan)
        for target in tables:
            columns = {
                "class_a": [names[i] for i in first],
                "class_b": [names[j] for j in second],
                "mean_r": found.matrix[first, second],
                "mean_abs_r": found.absolute.matrix[first, second],
                "image_error": blank if image is None else image[first, second],
                "chain_error": blank if chain is None else chain[first, second],
            }
            write_table(columns, target)
    for target in paths:
        if target.suffix in PICTURES:
            from lossk.report.class_picture import draw_hierarchy

            draw_hierarchy(found, tree, target)
    _wrote(paths)


def describe_pairs(found: Any, names: list[str]) -> list[str]:
    """The pairs of different classes whose mean correlation is highest, and lowest."""
    first, second = np.triu_indices(len(names), k=1)
    values = found.matrix[first, second]
    order = [int(i) for i in np.argsort(-values, kind="stable") if np.isfinite(values[i])]
    error = found.image_error
    lines = []
    for title, part in (("closest", order[:SHOWN]), ("farthest", order[::-1][: min(SHOWN, len(order) - SHOWN)])):
        for i in part:
            a, b = first[i], second[i]
            spread = "" if error is None else f" +- {error[a, b]:.3f}"
            lines.append(f"  {title:8s}  {values[i]:+.3f}{spread}  {names[a]} and {names[b]}")
    return lines


def run_compare(options: argparse.Namespace) -> None:
    from lossk.analysis import compare_kernels

    paths = _outputs(options, TABLES)
    a, b = open_kernel(options.a), open_kernel(options.b)
    check_integer("--k", options.k, 1, len(a) - 1, limit=f"N - 1 = {len(a) - 1}")
    found = compare_kernels(a, b, k=options.k, progress=len(a) > 10_000)
    print(f"{found.num_samples:,} samples live in both")
    print(f"entries above the diagonal  correlation of K {found.entry_correlation_k:.3f}, of R "
          f"{found.entry_correlation_r:.3f}")  # fmt: skip
    print(f"centered kernel alignment    K {found.cka_k:.3f}, R {found.cka_r:.3f}")
    print(f"  debiased                  K {found.debiased_cka_k:.3f}, R {found.debiased_cka_r:.3f}")
    print(f"{found.neighbors} nearest neighbors        {found.overlap:.1%} shared (chance {found.chance_overlap:.1%})")
    for target in paths:
        gained, lost = ((x >= 0).sum(dim=1) for x in (found.gained, found.lost))
        sample = np.arange(a.num_samples)
        write_table({"sample": sample, "overlap": found.overlaps, "gained": gained, "lost": lost}, target)
    _wrote(paths)
