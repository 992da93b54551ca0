"""Taxonomies: the spot checks of Fashion-MNIST's synsets, NLTK's own measures, and trees worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lossk.analysis import Taxonomy
from lossk.analysis.wordnet import DEBIAN_FOLDER, FASHION_SYNSETS, _read_folder, _resolve, wordnet_taxonomy
from lossk.errors import LosskError

OFFSETS = {
    "T-shirt": "03595614", "Trouser": "04489008", "Pullover": "04021028", "Dress": "03236735", "Coat": "03057021",
    "Sandal": "04133789", "Shirt": "04197391", "Sneaker": "03472535", "Bag": "02774152", "Ankle boot": "02872752",
}  # fmt: skip


@pytest.fixture(scope="module")
def fashion() -> Taxonomy:
    return wordnet_taxonomy(FASHION_SYNSETS, folder=DEBIAN_FOLDER)


@pytest.fixture(scope="module")
def reader() -> Any:
    return _read_folder(Path(DEBIAN_FOLDER))


def at(taxonomy: Taxonomy, measure: str, a: str, b: str) -> float:
    names = list(taxonomy.class_names)
    return float(taxonomy.similarity(measure)[names.index(a), names.index(b)])


def test_fashion_synsets_and_spot_checks(fashion: Taxonomy) -> None:
    assert dict(zip(fashion.class_names, fashion.class_nodes, strict=True)) == OFFSETS
    assert at(fashion, "wu_palmer", "Shirt", "T-shirt") == pytest.approx(0.952, abs=5e-4)
    assert at(fashion, "wu_palmer", "Trouser", "Shirt") == pytest.approx(0.900, abs=5e-4)
    assert at(fashion, "wu_palmer", "Sandal", "Sneaker") == pytest.approx(0.889, abs=5e-4)
    bag = [at(fashion, "wu_palmer", "Bag", name) for name in fashion.class_names if name != "Bag"]
    assert min(bag) == pytest.approx(0.556, abs=5e-4)
    assert max(bag) == pytest.approx(0.625, abs=5e-4)


def test_same_as_nltk(fashion: Taxonomy, reader: Any) -> None:
    synsets = [reader.synset_from_pos_and_offset("n", int(node)) for node in fashion.class_nodes]
    for measure, name in (("wu_palmer", "wup_similarity"), ("path", "path_similarity")):
        expected = np.array([[1.0 if a == b else getattr(a, name)(b) for b in synsets] for a in synsets])
        np.testing.assert_allclose(fashion.similarity(measure), expected, rtol=1e-12)


def test_content_counts_all_hyponyms(fashion: Taxonomy) -> None:
    root = [node for node, up in fashion.parents.items() if not up]
    assert root == ["00001740"]  # entity
    assert fashion.content["00001740"] == pytest.approx(0.0)
    assert fashion.content["04133789"] < 1.0  # sandal: flip-flop, huarache, ... are below it
    lin = fashion.similarity("lin")
    assert ((lin >= 0) & (lin <= 1)).all()
    assert at(fashion, "lin", "Sandal", "Sneaker") > at(fashion, "lin", "Sandal", "Bag")


@pytest.mark.parametrize("given", ["n04197391", 4197391, "04197391", "shirt.n.01"])
def test_names_offsets_and_wnids_are_the_same(given: str | int, reader: Any) -> None:
    assert _resolve(reader, "x", given) == "04197391"


@pytest.mark.parametrize("given", ["nosuchthing.n.01", "n00000001", 17, "run.v.01", "shirt.n.77"])
def test_what_is_no_noun_synset_is_refused(given: str | int, reader: Any) -> None:
    with pytest.raises(ValueError, match=r"'x' is .* no noun synset"):
        _resolve(reader, "x", given)


def test_missing_wordnet_says_what_to_do(tmp_path: Any) -> None:
    with pytest.raises(LosskError, match=r"data\.noun is missing"):
        wordnet_taxonomy({"x": "shirt.n.01"}, folder=tmp_path)


def test_a_tree_by_hand() -> None:
    tree = Taxonomy.from_nested({"clothing": ["shirt", "coat"], "footwear": {"shoe": ["boot"]}, "bag": None})
    assert tree.class_names == ("shirt", "coat", "boot", "bag")
    # (root) clothing shirt coat footwear shoe boot bag: 8 nodes
    assert at(tree, "path", "shirt", "coat") == pytest.approx(1 / 3)
    assert at(tree, "path", "shirt", "boot") == pytest.approx(1 / 6)
    assert at(tree, "wu_palmer", "shirt", "coat") == pytest.approx(2 * 2 / (1 + 1 + 4))
    assert at(tree, "wu_palmer", "shirt", "boot") == pytest.approx(2 / (2 + 3 + 2))
    clothing = 1 - math.log(3) / math.log(8)
    assert at(tree, "lin", "shirt", "coat") == pytest.approx(clothing)
    assert at(tree, "lin", "shirt", "bag") == pytest.approx(0.0)
    assert np.diag(tree.similarity()).tolist() == [1.0] * 4


def test_several_parents() -> None:
    graph = {"x": ["left", "right"], "y": "right", "z": "left", "left": "top", "right": ["middle"], "middle": "top"}
    found = Taxonomy.from_parents(graph, {"x": "x", "y": "y", "z": "z"})
    assert at(found, "path", "y", "z") == pytest.approx(1 / 6)
    assert at(found, "path", "x", "y") == pytest.approx(1 / 3)
    assert at(found, "wu_palmer", "x", "y") == pytest.approx(2 * 3 / (1 + 1 + 6))


@pytest.mark.parametrize(
    ("parents", "nodes", "message"),
    [
        ({"a": "b"}, {"c": "c"}, "must be nodes of the taxonomy, got 'c'"),
        ({"a": "b", "b": "a"}, {"c": "a"}, "there is a cycle"),
        ({"a": "b", "b": ["a", "top"]}, {"c": "a"}, "'a' is in or below one"),
    ],
)
def test_bad_graphs(parents: dict, nodes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Taxonomy.from_parents(parents, nodes)


def test_a_name_twice() -> None:
    with pytest.raises(ValueError, match="a name twice, got 'x'"):
        Taxonomy.from_nested({"x": ["y"], "z": ["x"]})
