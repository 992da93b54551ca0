"""How far similarities of classes agree with a taxonomy: rank correlations, Mantel tests, partitions, triplets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from lossk.analysis.class_matrix import Array, ClassMatrix, as_class_matrix
from lossk.analysis.hierarchy import dendrogram
from lossk.analysis.inputs import check_labels, check_named, check_square
from lossk.analysis.mantel import mantel, partial_spearman
from lossk.analysis.taxonomy import MEASURES, Taxonomy
from lossk.checks import check_choice, check_mapping, check_strings, check_text
from lossk.optional import check_installed
from lossk.records import check_record

BAR = "\\|"  # a bar inside a cell of a Markdown table


@dataclass(frozen=True)
class AlignmentRow:
    """One statistic of one similarity against one reference."""

    similarity: str
    reference: str  # a measure of the taxonomy, or a partition
    statistic: str
    value: float
    image_error: float  # standard error over images; NaN where the similarity has no replicates
    chain_error: float  # over chains
    p: float  # of the Mantel tests; NaN elsewhere
    permutations: int  # that p rests on: all C! where the test is exact

    def __post_init__(self) -> None:
        check_record(self)


@dataclass(frozen=True)
class Alignment:
    """Every statistic, in rows; `note` says what they rest on."""

    rows: tuple[AlignmentRow, ...]
    num_classes: int
    note: str

    def __post_init__(self) -> None:
        check_record(self)

    def row(self, similarity: str, reference: str, statistic: str) -> AlignmentRow:
        """The one row of that name."""
        for name, value in (("similarity", similarity), ("reference", reference), ("statistic", statistic)):
            check_text(name, value)
        for row in self.rows:
            if (row.similarity, row.reference, row.statistic) == (similarity, reference, statistic):
                return row
        known = {"similarity": similarity, "reference": reference, "statistic": statistic}
        for name, value in known.items():
            there = dict.fromkeys(getattr(row, name) for row in self.rows)
            check_choice(name, value, there)
        raise KeyError(f"there is no statistic {statistic!r} of similarity {similarity!r} against {reference!r}")

    def records(self) -> list[dict[str, Any]]:
        """Plain rows, for pandas.DataFrame and JSON."""
        return [asdict(row) for row in self.rows]

    def markdown(self, reference: str, statistics: Sequence[str]) -> str:
        """A table against one reference: a row per similarity, a column per statistic, errors over images, chains."""
        statistics = check_strings("statistics", statistics, "statistics")
        check_choice("reference", reference, dict.fromkeys(row.reference for row in self.rows))
        names = list(dict.fromkeys(row.similarity for row in self.rows))
        heads = [statistic.replace("|", BAR) for statistic in statistics]
        lines = [f"| | {' | '.join(heads)} |", f"|---|{'--:|' * len(statistics)}"]
        for name in names:
            lines.append(
                f"| {name.replace('|', BAR)} | "
                + " | ".join(_cell(self, name, reference, s) for s in statistics)
                + " |"
            )
        return "\n".join(lines)


def align(
    similarities: Mapping[str, ClassMatrix | Array],
    taxonomy: Taxonomy | Mapping[str, Array],
    *,
    controls: Mapping[str, ClassMatrix | Array] | None = None,
    partitions: Mapping[str, Sequence[int]] | None = None,
    alternative: str = "two-sided",
    num_permutations: int = 9999,
    seed: int = 0,
) -> Alignment:
    """Compare similarities of C classes with a taxonomy, and with what else might explain the agreement.

    For each similarity and each measure of the taxonomy, over the C (C - 1) / 2 pairs of classes: "spearman" (with the
    p of a Mantel test), "kendall" (tau-b), "cophenetic" (Spearman, of the similarity's own dendrogram), "triplets"
    (`triplet_agreement`; chance is 0.5), and "partial" (partial Mantel test, `lossk.analysis.mantel`) given all
    controls together and "partial | NAME" given each. For each partition the similarity's dendrogram cut into as many
    parts: "purity", "nmi", "ari".

    Errors come from the similarity's replicates alone: images and chains. Another sample of *classes* is not among
    them, and with ten classes that is the larger uncertainty; the Mantel tests' p speak to it.

    Args:
        similarities: name -> `class_similarity(...).signed` or `.absolute`, or any symmetric [C, C].
        taxonomy: all its measures; or name -> similarity [C, C].
        controls: name -> similarity to hold fixed. One that is also among the similarities, by name, is not held
            against itself.
        partitions: name -> part of each class, [C].
        alternative: "two-sided", or "greater": only agreement counts.

    Raises:
        ValueError: a matrix of another size, not symmetric, not finite, or above 1 off the diagonal (similarities).
    """
    check_installed("sklearn", "analysis", "alignment", package="scikit-learn")
    references = (
        {measure: taxonomy.similarity(measure) for measure in MEASURES}
        if isinstance(taxonomy, Taxonomy)
        else check_named("taxonomy", taxonomy)
    )
    first = next(iter(references.values()))
    count = len(first.matrix if isinstance(first, ClassMatrix) else check_square("taxonomy", first))
    truth = {name: found.matrix for name, found in _matrices("taxonomy", references, count).items()}
    given = _matrices("similarities", check_named("similarities", similarities), count)
    held = {
        name: found.matrix
        for name, found in _matrices(
            "controls", check_mapping("controls", {} if controls is None else controls), count
        ).items()
    }
    divided = {
        name: _parts(name, parts, count)
        for name, parts in check_mapping("partitions", {} if partitions is None else partitions).items()
    }
    rows: list[AlignmentRow] = []
    options: dict[str, Any] = {"alternative": alternative, "num_permutations": num_permutations, "seed": seed}
    for name, matrix in given.items():
        others = {key: value for key, value in held.items() if key != name}
        for reference, target in truth.items():
            rows += _against(name, matrix, reference, target, others, options)
        for partition, parts in divided.items():
            rows += _partitioned(name, matrix, partition, parts)
    note = (
        f"{count} classes, {count * (count - 1) // 2} pairs that are not independent. Errors are over the images and "
        f"chains given, not over classes. p: {alternative}, by relabelling the classes."
    )
    return Alignment(tuple(rows), count, note)


def _parts(name: str, given: Any, count: int) -> list[int]:
    parts = check_labels(f"partitions: {name}", given).tolist()
    if len(parts) != count:
        raise ValueError(f"partitions: {name!r} must have one part per class, {count}, got {len(parts)}")
    return parts


def _matrices(argument: str, given: Mapping[str, ClassMatrix | Array], count: int) -> dict[str, ClassMatrix]:
    return {name: as_class_matrix(f"{argument}: {name}", matrix, count) for name, matrix in given.items()}


def _against(
    name: str,
    matrix: ClassMatrix,
    reference: str,
    target: Array,
    others: Mapping[str, Array],
    options: Mapping[str, Any],
) -> list[AlignmentRow]:
    upper = np.triu_indices(len(target), 1)

    def row(statistic: str, function: Any, p: float = float("nan"), permutations: int = 0) -> AlignmentRow:
        found = matrix.estimate(function)
        return AlignmentRow(
            name, reference, statistic, found.value, found.image_error, found.chain_error, p, permutations
        )

    plain = mantel(matrix.matrix, target, **options)
    rows = [
        row("spearman", lambda m: partial_spearman(m, target, ()), plain.p, plain.permutations),
        row("kendall", lambda m: float(stats.kendalltau(m[upper], target[upper]).statistic)),
        row("triplets", lambda m: triplet_agreement(m, target)),
        row("cophenetic", lambda m: _cophenetic(m, target)),
    ]
    sets = {f"partial | {key}": [value] for key, value in others.items()}
    if len(others) > 1:
        sets["partial"] = list(others.values())
    for statistic, fixed in sets.items():
        test = mantel(matrix.matrix, target, controls=fixed, **options)
        rows.append(
            row(statistic, lambda m, fixed=fixed: partial_spearman(m, target, fixed), test.p, test.permutations)
        )
    return rows


def _cophenetic(matrix: Array, target: Array) -> float:
    """Spearman correlation of the target with minus the heights of the similarity's dendrogram."""
    return partial_spearman(-dendrogram(matrix, range_names(len(matrix))).cophenetic, target, ())


def range_names(count: int) -> list[str]:
    """ "0" to "C - 1"."""
    return [str(i) for i in range(count)]


def _partitioned(name: str, matrix: ClassMatrix, partition: str, parts: Sequence[int]) -> list[AlignmentRow]:
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    truth = np.unique(np.asarray(parts), return_inverse=True)[1]
    nan, num_parts = float("nan"), int(truth.max()) + 1

    def cut(m: Array) -> np.ndarray:
        return dendrogram(m, range_names(len(m))).cut(num_parts)

    scores = {
        "purity": lambda m: partition_purity(cut(m), truth),
        "nmi": lambda m: float(normalized_mutual_info_score(truth, cut(m))),
        "ari": lambda m: float(adjusted_rand_score(truth, cut(m))),
    }
    found = {statistic: matrix.estimate(function) for statistic, function in scores.items()}
    return [
        AlignmentRow(name, partition, statistic, e.value, e.image_error, e.chain_error, nan, 0)
        for statistic, e in found.items()
    ]


def partition_purity(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of classes that belong to the majority of the found part they are in, in (0, 1]."""
    found = check_labels("found", found).numpy()
    truth = check_labels("truth", truth, len(found)).numpy()
    if truth.min() < 0:
        raise ValueError(f"truth must be whole numbers from 0, got {truth.min()}")
    return float(sum(np.bincount(truth[found == part]).max() for part in np.unique(found)) / len(truth))


def triplet_agreement(similarity: Array, target: Array) -> float:
    """Of all (a; b, c) where the target puts b strictly nearer to a than c, the share where the similarity does too.

    A tie of the similarity counts half; NaN where the target never prefers.
    """
    similarity, target = check_square("similarity", similarity), check_square("target", target)
    if len(similarity) != len(target):
        raise ValueError(f"similarity must be of the target's {len(target)} classes, got {len(similarity)}")
    excess, total = 0.0, 0.0
    for a in range(len(target)):
        others = np.arange(len(target)) != a
        more, pairs = _concordance(similarity[a, others], target[a, others])
        excess, total = excess + more, total + pairs
    return float((1.0 + excess / total) / 2) if total else float("nan")


def _concordance(x: Array, y: Array) -> tuple[float, float]:
    """Concordant less discordant pairs, and pairs that differ in y."""
    if len(x) <= 64:
        upper = np.triu_indices(len(x), 1)
        of_y = np.sign(y[upper[0]] - y[upper[1]])
        return float(np.sign(x[upper[0]] - x[upper[1]]) @ of_y), float(np.abs(of_y).sum())
    pairs = len(x) * (len(x) - 1) / 2
    untied = [pairs - float((n * (n - 1) / 2).sum()) for n in (np.unique(v, return_counts=True)[1] for v in (x, y))]
    tau = float(stats.kendalltau(x, y).statistic)  # sorts, where the pairs would be too many
    return (tau * (untied[0] * untied[1]) ** 0.5 if np.isfinite(tau) else 0.0), untied[1]


def _cell(alignment: Alignment, name: str, reference: str, statistic: str) -> str:
    try:
        row = alignment.row(name, reference, statistic)
    except (KeyError, ValueError):
        return "–"
    errors = [f"{error:.2f}" for error in (row.image_error, row.chain_error) if np.isfinite(error)]
    text = f"{row.value:.2f}" + (f" ± {', '.join(errors)}" if errors else "")
    return text + (f" (p = {row.p:.3f})" if np.isfinite(row.p) else "")
