"""Classes in WordNet 3.0's noun taxonomy, read by NLTK from Debian's `wordnet-base` or from NLTK's own data."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossk.analysis.inputs import check_named
from lossk.analysis.taxonomy import Taxonomy
from lossk.checks import check_integer, check_optional, check_place
from lossk.errors import LosskError
from lossk.optional import check_installed

DEBIAN_FOLDER = "/usr/share/wordnet"
LEXICOGRAPHER_FILES = 45

FASHION_SYNSETS = {
    "T-shirt": "jersey.n.03",  # the sense with the lemma t-shirt
    "Trouser": "trouser.n.01",
    "Pullover": "pullover.n.01",
    "Dress": "dress.n.01",
    "Coat": "coat.n.01",
    "Sandal": "sandal.n.01",
    "Shirt": "shirt.n.01",
    "Sneaker": "gym_shoe.n.01",  # the synset with the lemma sneaker
    "Bag": "bag.n.04",  # handbag
    "Ankle boot": "boot.n.01",
}


def wordnet_taxonomy(synsets: Mapping[str, str | int], *, folder: str | Path | None = None) -> Taxonomy:
    """The taxonomy of classes given as noun synsets of WordNet. Needs lossk[analysis].

    Args:
        synsets: class name -> synset, in the order of the labels: a name ("shirt.n.01"), an offset in WordNet 3.0
            (4197391 or "04197391"), or ImageNet's wnid ("n04197391").
        folder: with WordNet's index.noun, data.noun and so on; None looks where Debian's `wordnet-base` puts them, then
            in NLTK's own data (nltk.download("wordnet")).

    Raises:
        LosskError: NLTK or WordNet is missing, with what to install.
        ValueError: no such noun synset.
    """
    synsets = _check_synsets(synsets)
    return _taxonomy(_reader(check_optional(check_place, "folder", folder)), synsets)


def require_wordnet() -> None:
    """Raise LosskError, with what to install, unless a kernel can be aligned with WordNet and drawn in its colors.

    To be asked before a run rather than after it; it does not read WordNet.
    """
    for module, package in (("umap", "umap-learn"), ("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        check_installed(module, "analysis", "alignment with WordNet, and a map in its colors,", package=package)
    check_installed("nltk", "analysis", "WordNet")
    if not (Path(DEBIAN_FOLDER) / "data.noun").is_file():
        _reader(None)


def wordnet_with_words(
    synsets: Mapping[str, str | int], *, folder: str | Path | None = None
) -> tuple[Taxonomy, dict[str, str]]:
    """`wordnet_taxonomy`, and the first word of every node of it."""
    synsets = _check_synsets(synsets)
    reader = _reader(check_optional(check_place, "folder", folder))
    taxonomy = _taxonomy(reader, synsets)
    words = {
        node: reader.synset_from_pos_and_offset("n", int(node)).lemma_names()[0].replace("_", " ")
        for node in taxonomy.parents
    }
    return taxonomy, words


def _check_synsets(synsets: Any) -> dict[str, str | int]:
    found = dict(check_named("synsets", synsets))
    for name, synset in found.items():
        if not isinstance(synset, str):
            check_integer(f"synsets[{name!r}]", synset, 0)
    return dict(found)


def _taxonomy(reader: Any, synsets: Mapping[str, str | int]) -> Taxonomy:
    names = {name: _resolve(reader, name, given) for name, given in synsets.items()}
    return Taxonomy.of_graph(_noun_graph(reader), names)


def _reader(folder: str | Path | None) -> Any:
    check_installed("nltk", "analysis", "WordNet")
    where = Path(DEBIAN_FOLDER if folder is None else folder)
    if (where / "data.noun").is_file():
        return _read_folder(where)
    if folder is not None:
        raise LosskError(f"folder {str(where)!r} must hold WordNet: data.noun is missing")
    import nltk

    try:
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
        return wordnet
    except LookupError as error:
        raise LosskError(
            "WordNet is missing; on Debian or Ubuntu: apt-get install wordnet-base; elsewhere: "
            f"python -m nltk.downloader wordnet (NLTK {nltk.__version__})"
        ) from error


def _read_folder(where: Path) -> Any:
    """NLTK's reader on a folder of WordNet's own files."""
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    if str(where) not in nltk.data.path:
        nltk.data.path.append(str(where))  # how NLTK is told that files outside its data may be read

    class Reader(WordNetCorpusReader):
        """Without what Debian's package leaves out and nothing here reads: the names of the lexicographer files, and
        the map of sense keys to other versions of WordNet."""

        def open(self, file: str) -> Any:
            if file == "lexnames":
                return io.StringIO("".join(f"{i:02d}\tfile{i:02d}\t0\n" for i in range(LEXICOGRAPHER_FILES)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            return None

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The multilingual functions are not available", UserWarning)
        return Reader(str(where), None)


def _resolve(reader: Any, name: str, given: str | int) -> str:
    """The offset, as 8 digits, of a noun synset."""
    text = f"{given:08d}" if isinstance(given, int) else str(given)
    try:
        if re.fullmatch(r"n?\d{8}", text):
            synset = reader.synset_from_pos_and_offset("n", int(text[-8:]))
        else:
            synset = reader.synset(text)
    except Exception as error:  # NLTK raises WordNetError, AssertionError, KeyError or ValueError, as the case may be
        raise ValueError(f"synsets: {name!r} is {given!r}, which is no noun synset of WordNet 3.0") from error
    if synset is None or synset.pos() != "n":
        raise ValueError(f"synsets: {name!r} is {given!r}, which is no noun synset of WordNet 3.0")
    return f"{synset.offset():08d}"


def _noun_graph(reader: Any) -> dict[str, tuple[str, ...]]:
    """Every noun synset's offset -> those of its hypernyms (of instances too), from the pointers in data.noun.

    wndb(5): offset, lexicographer file, type, number of words in hexadecimal, words each with a number, number of
    pointers, pointers of four fields each.
    """
    graph = {}
    with reader.open("data.noun") as lines:
        for line in lines:
            if line.startswith(" "):  # the licence
                continue
            fields = line.split(" | ", 1)[0].split()
            first = 4 + 2 * int(fields[3], 16) + 1
            pointers = fields[first : first + 4 * int(fields[first - 1])]
            graph[fields[0]] = tuple(
                target for symbol, target in zip(pointers[::4], pointers[1::4], strict=True) if symbol in ("@", "@i")
            )
    return graph
