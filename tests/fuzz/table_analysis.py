"""Valid calls of `lossk.analysis`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import lossk

from . import rules as r
from .table import Table
from .world import CLASSES, NAMES, TREE, N, World

MATRIX = r.array(2)
OF_CLASSES = r.mapping_of(r.text, r.anything, least=1)  # what a similarity may be shows beside the others
RANDOM = {"seed": r.integer(0), "num_bootstrap": r.integer(0)}
DATA = r.either(r.array(1, 2, 3), r.instance(tuple, list, dict), r.anything)


def add_to(table: Table, w: World) -> None:
    """Every entry of the package."""
    _read_side(table, w)
    _classes(table, w)
    _alignment(table, w)
    _attribution(table, w)
    _evaluation(table, w)


def _read_side(table: Table, w: World) -> None:
    from lossk.analysis.baselines import Baseline
    from lossk.analysis.maps import KernelMap

    kernel = {"kernel": r.instance(lossk.LossKernel)}
    near = {"k": r.integer(1), "rows": r.optional(r.rows)}
    table.add("lossk.analysis.neighbors.significant_neighbors", {"kernel": w.kernel, "k": 3}, {**kernel, **near})
    table.add(
        "lossk.analysis.maps.map_kernel",
        {"kernel": w.kernel, "num_neighbors": 3},
        {
            **kernel,
            "dimensions": r.integer(1, 10),
            "num_neighbors": r.integer(2),
            "min_dist": r.number(least=0.0, most=1.0),
            "seed": r.integer(0),
            "neighbors": r.optional(r.instance(lossk.Neighbors)),
        },
        work=("lossk.analysis.maps._umap",),
    )
    table.add(
        "lossk.analysis.maps.cluster",
        {"map_or_coordinates": w.random(N, 2), "min_cluster_size": 2},
        {
            "map_or_coordinates": r.either(r.instance(KernelMap), r.array(2, finite=False)),
            "min_cluster_size": r.integer(2),
            "min_samples": r.optional(r.integer(1)),
            "labels": r.optional(r.labels),
        },
        words={"map_or_coordinates": ("coordinates",)},
    )
    table.add("lossk.analysis.spectrum.spectrum", {"kernel": w.kernel, "k": 3}, {**kernel, "k": r.integer(1)})
    table.add(
        "lossk.analysis.spectrum.Spectrum.eigen_samples",
        {"j": 0, "m": 2},
        {"j": r.integer(0, 2), "m": r.integer(0)},
        on=_spectrum(w),
    )
    _maps(table, w)
    both = r.either(r.instance(lossk.LossKernel, Baseline), MATRIX)
    table.add(
        "lossk.analysis.compare.compare_kernels",
        {"a": w.kernel, "b": w.baseline, "k": 2},
        {"a": both, "b": both, "k": r.integer(1)},
    )
    table.add(
        "lossk.analysis.sequences.sequence_traces",
        {"traces": w.token_traces},
        {"traces": r.instance(lossk.LossTraces)},
    )
    table.add("lossk.analysis.stored_traces.open_with_chains", {"path": w.store})
    _purity(table, w)


def _maps(table: Table, w: World) -> None:
    from lossk.analysis.maps import KernelMap, cluster

    points, tensor = w.random(N, 2), r.instance(torch.Tensor)
    found = w.neighbors
    drawn = KernelMap(points, found.index, found.correlation, torch.zeros(N, dtype=torch.bool))
    _record(table, drawn, "lossk.analysis.maps.KernelMap", {})
    _record(table, cluster(drawn, min_cluster_size=2, labels=w.labels), "lossk.analysis.maps.Clusters",
            dict.fromkeys(("composition", "classes"), r.optional(tensor)))  # fmt: skip
    number = r.either(r.number(), _nan, _infinite)
    _record(table, _spectrum(w), "lossk.analysis.spectrum.Spectrum",
            dict.fromkeys(("trace", "participation_ratio"), number))  # fmt: skip


def _spectrum(w: World) -> Any:
    from lossk.analysis.spectrum import spectrum

    return spectrum(w.kernel, 3)


def _purity(table: Table, w: World) -> None:
    index = {"index": r.array(2, kinds="iu"), "labels": r.labels}
    for name in ("class_purity", "neighbor_purity"):
        table.add(f"lossk.analysis.purity.{name}", {"index": w.neighbors.index, "labels": w.labels}, index)
    table.add("lossk.analysis.purity.chance_purity", {"labels": w.labels}, {"labels": r.labels})
    table.add(
        "lossk.analysis.purity.raw_neighbors",
        {"images": w.x, "k": 2},
        {"images": r.array(2, 3, 4), "k": r.integer(1)},
    )


def _classes(table: Table, w: World) -> None:
    from lossk.analysis import ClassMatrix, class_similarity, dendrogram
    from lossk.analysis.baselines import Baseline

    names = r.sequence_of(r.text, least=1)
    table.add(
        "lossk.analysis.hierarchy.class_similarity",
        {"source": w.kernel, "labels": w.labels, "class_names": NAMES, "num_bootstrap": 3},
        {
            "source": r.either(r.instance(lossk.LossKernel, Baseline), MATRIX),
            "labels": r.labels,
            "class_names": names,
            **RANDOM,
        },
    )
    table.add(
        "lossk.analysis.hierarchy.dendrogram",
        {"similarity": w.similarity, "class_names": NAMES},
        {
            "similarity": r.either(r.instance(ClassMatrix), MATRIX),
            "class_names": names,
            "method": r.choice("single", "complete", "average", "weighted", "centroid", "median", "ward"),
        },
    )
    tree = dendrogram(w.similarity, NAMES)
    table.add("lossk.analysis.hierarchy.Dendrogram.cut", {"num_parts": 2}, {"num_parts": r.integer(1)}, on=tree)
    table.add("lossk.analysis.class_matrix.ClassMatrix.estimate", {"statistic": np.max}, {"statistic": r.function},
              on=w.class_matrix)  # fmt: skip
    loose = r.array(2, finite=False)
    array = {
        "linkage": loose,
        "cophenetic": loose,
        "counts": r.array(1, 2, 3, finite=False),
        "matrix": r.array(2, finite=False),
    }
    stack = {"images": r.optional(r.array(3, finite=False)), "chains": r.optional(r.array(3, finite=False))}
    any_names, any_number = {"class_names": r.sequence_of(r.text)}, r.either(r.number(), _nan, _infinite)
    _record(table, tree, "lossk.analysis.hierarchy.Dendrogram",
            {**array, **any_names, "cophenetic_correlation": any_number})  # fmt: skip
    _record(table, w.class_matrix, "lossk.analysis.class_matrix.ClassMatrix",
            {**array, **stack, "groups": r.integer(0)})  # fmt: skip
    similarity = class_similarity(w.kernel, w.labels, NAMES, num_bootstrap=0)
    matrix = r.instance(ClassMatrix)
    _record(table, similarity, "lossk.analysis.hierarchy.ClassSimilarity",
            {**array, "class_names": r.sequence_of(r.text), "signed": matrix, "absolute": matrix})  # fmt: skip
    error = dict.fromkeys(("value", "image_error", "chain_error"), r.either(r.number(), _nan, _infinite))
    _record(table, w.class_matrix.estimate(np.max), "lossk.analysis.class_matrix.Estimate", error)


def _nan(value: Any) -> bool:
    return isinstance(value, float | np.floating) and value != value


def _infinite(value: Any) -> bool:
    return isinstance(value, float | np.floating) and abs(value) == float("inf")


def _record(table: Table, made: Any, name: str, rules: dict[str, r.Rule]) -> None:
    """A dataclass of results: its fields as the library filled them in."""
    import dataclasses

    fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    table.add(name, fields, rules)


def _alignment(table: Table, w: World) -> None:
    from lossk.analysis import Taxonomy, align
    from lossk.analysis.alignment import AlignmentRow

    parts = {"halves": [0, 0, 1, 1]}
    given = {"similarities": {"R": w.similarity}, "taxonomy": w.taxonomy, "num_permutations": 3}
    permuted = {"alternative": r.choice("two-sided", "greater"), "num_permutations": r.integer(1), **RANDOM}
    table.add(
        "lossk.analysis.alignment.align",
        {**given, "partitions": parts},
        {
            "similarities": OF_CLASSES,
            "taxonomy": r.either(r.instance(Taxonomy), OF_CLASSES),
            "controls": r.optional(r.mapping_of(r.text, r.anything)),
            "partitions": r.optional(r.mapping_of(r.text, r.anything)),
            **permuted,
        },
    )
    found = align(**given)
    table.add("lossk.analysis.alignment.Alignment.row",
              {"similarity": "R", "reference": "path", "statistic": "kendall"}, on=found)  # fmt: skip
    table.add("lossk.analysis.alignment.Alignment.markdown",
              {"reference": "path", "statistics": ["kendall"]}, on=found)  # fmt: skip
    number = r.either(r.number(), _nan, _infinite)
    fields = dict.fromkeys(("value", "image_error", "chain_error", "p"), number)
    _record(table, found.rows[0], "lossk.analysis.alignment.AlignmentRow", {**fields, "permutations": r.integer(0)})
    _record(table, found, "lossk.analysis.alignment.Alignment",
            {"rows": r.sequence_of(r.instance(AlignmentRow)), "num_classes": r.integer(0)})  # fmt: skip
    pair = {"similarity": w.similarity, "target": w.similarity}
    table.add("lossk.analysis.alignment.triplet_agreement", pair, {"similarity": MATRIX, "target": MATRIX})
    table.add("lossk.analysis.alignment.partition_purity",
              {"found": np.array([0, 0, 1, 1]), "truth": np.array([0, 1, 1, 1])},
              {"found": r.labels, "truth": r.labels})  # fmt: skip
    two = {"a": w.similarity, "b": w.similarity}
    matrices = {"a": MATRIX, "b": MATRIX, "controls": r.sequence_of(r.anything)}
    table.add("lossk.analysis.mantel.mantel", {**two, "num_permutations": 3}, {**matrices, **permuted})
    table.add("lossk.analysis.mantel.partial_spearman", {**two, "controls": ()}, matrices)
    _taxonomies(table, w)


def _taxonomies(table: Table, w: World) -> None:
    from lossk.analysis import Taxonomy

    nodes = r.mapping_of(r.text, r.text, least=1)
    parents = {"ant": "insect", "bee": "insect", "cow": "mammal", "insect": "animal", "mammal": "animal"}
    table.add("lossk.analysis.taxonomy.Taxonomy.from_nested", {"tree": TREE},
              {"tree": r.mapping_of(r.text, r.anything, least=1)})  # fmt: skip
    table.add("lossk.analysis.taxonomy.Taxonomy.from_parents",
              {"parents": parents, "class_nodes": {"an ant": "ant", "a cow": "cow"}},
              {"parents": r.mapping_of(r.text, r.anything, least=1), "class_nodes": nodes})  # fmt: skip
    table.add("lossk.analysis.taxonomy.Taxonomy.similarity", {"measure": "path"},
              {"measure": r.choice("wu_palmer", "path", "lin")}, on=w.taxonomy)  # fmt: skip
    _record(table, w.taxonomy, "lossk.analysis.taxonomy.Taxonomy",
            {"parents": r.mapping_of(r.text, r.anything), "content": r.mapping_of(r.text, r.number())})  # fmt: skip
    one = {"taxonomy": r.instance(Taxonomy)}
    table.add("lossk.analysis.taxonomy_order.places", {"taxonomy": w.taxonomy}, one)
    table.add("lossk.analysis.taxonomy_order.stretches", {"taxonomy": w.taxonomy},
              {**one, "most": r.integer(1), "least_share": r.number(least=0.0, most=1.0)})  # fmt: skip
    table.add("lossk.analysis.taxonomy_order.Stretch", {"node": "a", "first": 0, "count": 1},
              {"first": r.integer(0), "count": r.integer(0)})  # fmt: skip
    synset = r.either(r.text, r.integer(0))
    wordnet = {"synsets": r.mapping_of(r.text, synset, least=1), "folder": r.optional(r.path)}
    for name in ("wordnet_taxonomy", "wordnet_with_words"):
        table.add(f"lossk.analysis.wordnet.{name}", {"synsets": {"shirt": "shirt.n.01", "coat": "coat.n.01"}},
                  wordnet, work=("lossk.analysis.wordnet._reader",))  # fmt: skip


def _attribution(table: Table, w: World) -> None:
    from lossk.analysis.attribution import Influence, Ranked, influence
    from lossk.analysis.baselines import Baseline

    table.add(
        "lossk.analysis.attribution.influence",
        {"cross": w.cross, "top": 2},
        {
            "cross": r.instance(lossk.CrossKernel),
            "top": r.integer(1),
            "by": r.choice("influence", "correlation"),
        },
    )
    labels = torch.arange(N) % 2
    either = r.instance(lossk.LossKernel, lossk.LossTraces)
    table.add("lossk.analysis.attribution.mislabel_scores", {"kernel": w.kernel, "labels": labels},
              {"kernel": either, "labels": r.optional(r.labels)})  # fmt: skip
    table.add("lossk.analysis.attribution.class_scores", {"kernel": w.kernel, "labels": labels},
              {"kernel": r.instance(lossk.LossKernel, Baseline), "labels": r.labels})  # fmt: skip
    scores = r.choice("self_influence", "mean_loss", "class_correlation", "class_margin")
    table.add("lossk.analysis.attribution.mislabel_ranking", {"kernel": w.kernel, "labels": labels},
              {"kernel": either, "labels": r.optional(r.labels), "score": scores})  # fmt: skip
    found = influence(w.cross, top=2)
    _record(table, found.helpful, "lossk.analysis.attribution.Ranked", {})
    ranked = r.instance(Ranked)
    _record(table, found, "lossk.analysis.attribution.Influence", {"helpful": ranked, "harmful": ranked})
    assert isinstance(found, Influence)


def _evaluation(table: Table, w: World) -> None:
    from lossk.analysis import compare_kernels
    from lossk.analysis import evaluate as e

    table.add(
        "lossk.analysis.evaluate.random_subsets",
        {"num_train": N, "num_subsets": 2},
        {"num_train": r.integer(2), "num_subsets": r.integer(1), "fraction": r.number(above=0.0, most=1.0), **RANDOM},
    )
    mask = r.array(2, kinds="b")
    table.add(
        "lossk.analysis.evaluate.retrain_on_subsets",
        {"train": lambda rows, seed: torch.ones(3) * len(rows), "masks": w.masks, "progress": False},
        {"train": r.function, "masks": mask, "seeds": r.either(r.sequence_of(r.integer(), least=1), r.labels)},
    )
    table.add(
        "lossk.analysis.evaluate.linear_datamodeling_score",
        {"helpfulness": w.random(N, 3), "masks": w.masks, "outcomes": w.random(5, 3), "num_bootstrap": 3},
        {"helpfulness": MATRIX, "masks": mask, "outcomes": MATRIX, **RANDOM, "num_bootstrap": r.integer(2)},
    )
    table.add(
        "lossk.analysis.evaluate.auroc",
        {"scores": w.random(N), "wrong": torch.arange(N) % 2 == 0, "num_bootstrap": 3},
        {"scores": r.array(1), "wrong": r.array(1, kinds="b"), **RANDOM, "num_bootstrap": r.integer(2)},
    )
    table.add(
        "lossk.analysis.evaluate.randomisation_check",
        {"trained": w.kernel, "untrained": w.kernel, "labels": w.labels, "k": 2},
        {
            **dict.fromkeys(("trained", "untrained"), r.instance(lossk.LossKernel, type(w.baseline))),
            "labels": r.labels,
            "k": r.integer(1),
            "most": r.integer(2),
            **RANDOM,
        },
    )
    number = r.either(r.number(), _nan, _infinite)
    names = ("pearson", "spearman", "purity_trained", "purity_random", "purity_chance")
    check = e.randomisation_check(w.kernel, w.kernel, w.labels, k=2)
    _record(table, check, "lossk.analysis.evaluate.RandomisationCheck", dict.fromkeys(names, number))
    score = e.linear_datamodeling_score(w.random(N, 3), w.masks, w.random(5, 3), num_bootstrap=3)
    _record(table, score, "lossk.analysis.evaluate.DatamodelingScore", {"mean": number, "standard_error": number})
    comparison = compare_kernels(w.kernel, w.baseline, k=2)
    counts = {"num_samples": r.integer(0), "neighbors": r.integer(0)}
    floats = ("entry_correlation_k", "entry_correlation_r", "cka_k", "cka_r", "debiased_cka_k", "debiased_cka_r",
              "overlap", "chance_overlap")  # fmt: skip
    _record(table, comparison, "lossk.analysis.compare.Comparison", {**counts, **dict.fromkeys(floats, number)})
    assert len(NAMES) == CLASSES
