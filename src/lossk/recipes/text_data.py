"""Documents to sequences of tokens: packed windows, or padded paragraphs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lossk.ops.sample_loss import IGNORED
from lossk.recipes import RecipeError
from lossk.settings import check_choice, check_integer

DEBIAN_LICENCES = "/usr/share/common-licenses"  # in Debian's and Ubuntu's essential package base-files
SEQUENCES = ("packed", "padded")


@dataclass(frozen=True)
class Document:
    """One file's text."""

    name: str
    text: str


@dataclass(frozen=True)
class Sequences:
    """S sequences of at most T predicted tokens each."""

    inputs: Tensor  # [S, T] int64
    targets: Tensor  # [S, T] int64: inputs moved on by one; -100 where there is only padding
    document: Tensor  # [S] int64: which document each is from

    def __len__(self) -> int:
        return len(self.inputs)


def read_documents(path: str | Path) -> list[Document]:
    """A text file, or the text files of a folder by name; links are left out, and so are empty files.

    Raises RecipeError when there is none, saying where to get some.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.is_file() and not f.is_symlink())
    documents = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{file} is not UTF-8 text: {error}; --set task_args.text=FILE names another") from error
        if text.strip():
            documents.append(Document(file.name, text))
    if not documents:
        raise RecipeError(
            f"{path} holds no text; the licences that Debian and Ubuntu keep in {DEBIAN_LICENCES} come with their "
            "package base-files; elsewhere: --set task_args.text=FILE, or a FOLDER of UTF-8 text files"
        )
    return documents


def cut(documents: Sequence[Document], encode: Callable[[str], list[int]], *, context: int, how: str) -> Sequences:
    """Documents as sequences for a causal language model.

    Args:
        encode: text to token numbers.
        context: T, the tokens a sequence predicts at most.
        how: "packed": a document's tokens cut every T, each token but the first predicted once, an incomplete last
            window left out. "padded": one sequence per paragraph (blank lines between), cut at T; shorter ones are
            padded at the end, where nothing comes after.

    Raises RecipeError when nothing is long enough.
    """
    check_integer("context", context, 1)
    check_choice("sequences", how, SEQUENCES)
    rows, document = [], []
    for number, each in enumerate(documents):
        for ids in _windows(encode(each.text), context) if how == "packed" else _paragraphs(each.text, encode, context):
            rows.append(ids)
            document.append(number)
    if len(rows) < 2:
        unit = f"{context + 1} tokens in a row" if how == "packed" else "paragraphs of 2 tokens or more"
        raise RecipeError(f"the text must hold at least two sequences ({unit}), got {len(rows)}; give more text")
    inputs = torch.zeros(len(rows), context, dtype=torch.int64, device="cpu")
    targets = torch.full((len(rows), context), IGNORED, dtype=torch.int64, device="cpu")
    for row, ids in enumerate(rows):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1], dtype=torch.int64, device="cpu")
        targets[row, : len(ids) - 1] = torch.tensor(ids[1:], dtype=torch.int64, device="cpu")
    return Sequences(inputs, targets, torch.tensor(document, dtype=torch.int64, device="cpu"))


def _windows(ids: list[int], context: int) -> list[list[int]]:
    return [ids[start : start + context + 1] for start in range(0, len(ids) - context, context)]


def _paragraphs(text: str, encode: Callable[[str], list[int]], context: int) -> list[list[int]]:
    found = [encode(part.strip())[: context + 1] for part in re.split(r"\n\s*\n", text) if part.strip()]
    return [ids for ids in found if len(ids) > 1]
