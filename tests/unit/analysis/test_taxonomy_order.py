"""Places and stretches of a taxonomy worked out by hand; what is said and drawn of a kernel whose classes are nouns."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest
import torch

import lossk
from lossk.analysis import Taxonomy, map_kernel
from lossk.analysis.taxonomy_order import Stretch, places, stretches
from lossk.report.taxonomy_picture import draw_taxonomy_map
from lossk.report.taxonomy_summary import Classes, describe_taxonomy, wordnet_classes, write_taxonomy_map

TREE = {"animal": {"dog": ["pug", "husky"], "cat": ["tabby"]}, "thing": {"cup": None, "car": ["van", "taxi"]}}
DOGS_AND_CARS = ("n02110958", "n02110185", "n02099601", "n02930766", "n03769881", "n04467665")  # three of each
NAMES = ("pug", "husky", "golden retriever", "cab", "minibus", "trailer truck")


def test_a_branch_is_finished_before_the_next() -> None:
    taxonomy = Taxonomy.from_nested(TREE)
    assert taxonomy.class_names == ("pug", "husky", "tabby", "cup", "van", "taxi")
    # Children by name: animal (cat: tabby; dog: husky, pug), thing (car: taxi, van; cup).
    assert places(taxonomy).tolist() == [2, 1, 0, 5, 4, 3]


def test_a_node_of_two_parents_lies_under_the_first() -> None:
    taxonomy = Taxonomy.from_parents({"a": "root", "b": "root", "x": ["b", "a"], "y": "a"}, {"x": "x", "y": "y"})
    assert places(taxonomy).tolist() == [1, 0]


def test_a_class_above_others_comes_first() -> None:
    taxonomy = Taxonomy.from_parents(
        {"dog": "root", "pug": "dog", "cat": "root"}, {n: n for n in ("pug", "dog", "cat")}
    )
    assert places(taxonomy).tolist() == [2, 1, 0]
    assert stretches(taxonomy, most=2) == [Stretch("cat", 0, 1), Stretch("dog", 1, 2)]


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1, [("(root)", 0, 6)]),
        (2, [("animal", 0, 3), ("thing", 3, 3)]),
        (3, [("cat", 0, 1), ("dog", 1, 2), ("thing", 3, 3)]),
        (6, [("cat", 0, 1), ("husky", 1, 1), ("pug", 2, 1), ("taxi", 3, 1), ("van", 4, 1), ("cup", 5, 1)]),
    ],
)
def test_the_largest_node_is_split_first(most: int, expected: list) -> None:
    found = stretches(Taxonomy.from_nested(TREE), most)
    named = {"tabby": "cat"}  # a node of one child is split into it
    assert [(named.get(s.node, s.node), s.first, s.count) for s in found] == expected


def test_a_node_is_not_split_into_a_few_large_and_many_small_children() -> None:
    taxonomy = Taxonomy.from_nested({"a": ["a1", "a2", "a3", "a4"], "b": ["b1", "b2", "b3", "b4"]})
    assert [s.node for s in stretches(taxonomy, 8, least_share=0.2)] == ["a", "b"]
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        stretches(taxonomy, 0)


def kernel_of_classes(share: float) -> tuple[lossk.LossKernel, torch.Tensor]:
    """48 samples of six classes, dogs and vehicles: `share` of each loss is its kind's, an eighth its class's."""
    labels = torch.arange(48) % 6
    generator = torch.Generator().manual_seed(1)
    kind = torch.randn(2, 150, 2, generator=generator)[..., labels // 3]
    own_class = torch.randn(2, 150, 6, generator=generator)[..., labels]
    own = torch.randn(2, 150, 48, generator=generator)
    losses = share**0.5 * kind + 0.125**0.5 * own_class + (1 - share - 0.125) ** 0.5 * own
    return lossk.LossKernel.from_traces(lossk.LossTraces(losses)), labels


def spearmans(told: list[str]) -> list[float]:
    rows = [line for line in told if line.startswith(("  wu_palmer", "  path"))]
    assert len(rows) == 4
    return [float(row.split("spearman ")[1].split()[0]) for row in rows]


def test_planted_kinds_are_found_in_wordnet(tmp_path: Path) -> None:
    kernel, labels = kernel_of_classes(0.3)
    # Labels as positions in a longer list, two of its classes absent.
    synsets = ["n01440764", *DOGS_AND_CARS, "n15075141"]
    classes = wordnet_classes(labels + 1, ["tench", *NAMES, "toilet tissue"], synsets)
    assert tuple(classes.names) == NAMES
    assert classes.words["02084071"] == "dog"
    assert torch.equal(classes.labels, labels)
    told = describe_taxonomy(kernel, classes, kernel.neighbors(5)).splitlines()
    assert told[0] == "6 classes in WordNet."
    near, chance = (float(text.split()[-1].rstrip(".)")) for text in (told[1].split(" on average")[0], told[1]))
    similarity = classes.taxonomy.similarity()
    pairs = [similarity[labels[i], labels[j]] for i in range(48) for j in range(48) if i != j]
    assert chance == pytest.approx(sum(pairs) / len(pairs), abs=5e-4)
    assert near > chance + 0.1
    assert min(spearmans(told)) > 0.5
    unrelated, _ = kernel_of_classes(0.0)
    assert max(spearmans(describe_taxonomy(unrelated, classes, unrelated.neighbors(5)).splitlines())) < 0.5
    write_taxonomy_map(kernel, classes, tmp_path / "map.png", "Planted")
    assert matplotlib.image.imread(tmp_path / "map.png").shape[:2] == (792, 1155)


def test_few_classes_have_no_alignment() -> None:
    kernel, labels = kernel_of_classes(0.3)
    taxonomy = Taxonomy.from_nested({"dog": ["pug"], "car": ["cab"]})
    classes = Classes(taxonomy, labels // 3, ["pug", "cab"], {})
    assert describe_taxonomy(kernel, classes, kernel.neighbors(5)).endswith("with WordNet, which takes 4.")


def test_colors_follow_the_taxonomy(tmp_path: Path) -> None:
    """Two kinds, each drawn in its own half of the colors."""
    kernel, _ = kernel_of_classes(0.3)
    taxonomy = Taxonomy.from_nested({"a": ["x", "y"], "b": ["z", "w"]})
    drawn = map_kernel(kernel, num_neighbors=5)
    for labels, reddish in ((0, False), (3, True)):  # x is first, and w before z: z is last
        path = tmp_path / f"{labels}.png"
        wanted = torch.full((48,), 0 if not reddish else taxonomy.class_names.index("z")).numpy()
        draw_taxonomy_map(drawn, wanted, taxonomy, {}, path, title="t")
        points = matplotlib.image.imread(path)[100:740, 40:780, :3].reshape(-1, 3)
        points = points[points.max(axis=1) - points.min(axis=1) > 0.25]
        assert len(points) > 100
        assert (points[:, 0] > points[:, 2]).mean() == pytest.approx(float(reddish), abs=0.1)
