"""Samples of different lengths in one tensor: where they are filled up, with what, and what each was before."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from lossk.data.trees import Path, flat, map_tensors
from lossk.ops.sample_loss import IGNORED

HOLDERS = ("tokenizer", "processor", "feature_extractor")  # attributes of a collator that know how it pads
LABELS = ("label", "labels", "label_ids", "target", "targets", "decoder_labels")
Sizes = tuple[int, ...]  # of a tensor beyond its first dimension


@dataclass(frozen=True)
class Padding:
    """What was filled in, of a tree whose samples had different lengths.

    Attributes:
        own: [N, d] int32 of each padded tensor, by its path: the sizes that each sample had in the caller's own batch.
        left: whether samples stand at the end of a padded dimension, not at its beginning.
        values: what each padded tensor was filled with, by its path.
    """

    own: Mapping[Path, Tensor]
    left: bool
    values: Mapping[Path, float]

    def alone(self, tree: Any, sample: int) -> Any:
        """A batch of one sample, as views, in the length that it had in the caller's own batch."""
        paths = iter([path for path, _ in flat(tree)])

        def trimmed(tensor: Tensor) -> Tensor:
            own, one = self.own.get(next(paths)), tensor[sample : sample + 1]
            return one if own is None else one[inner(tuple(own[sample].tolist()), tensor.shape[1:], self.left)]

        return map_tensors(trimmed, tree)

    def by_share(self, tree: Any) -> Tensor:
        """[N] int64: the samples, those of which most is padding first."""
        share: Any = 0.0
        for path, tensor in flat(tree):
            if path in self.own:
                share = share + self.own[path].double().prod(dim=1) / tensor[0].numel()
        return torch.argsort(share, stable=True)

    def __str__(self) -> str:
        parts = [f"{spelled(path) or 'samples'} with {value:g}" for path, value in self.values.items()]
        return f"{', '.join(parts)}, {'before' if self.left else 'after'} each sample"


def inner(sizes: Sizes, full: Iterable[int], left: bool) -> tuple[slice, ...]:
    """Where samples of these sizes stand in a tensor [N, *full]."""
    spans = (slice(most - size, most) if left else slice(0, size) for size, most in zip(sizes, full, strict=True))
    return (slice(None), *spans)


def spelled(path: Path) -> str:
    """A path as an index: ['labels'][0]."""
    return "".join(f"[{key!r}]" for key in path)


class Filling:
    """What a collator pads with: by its tokenizer, by the names of parts, and else as it is seen in its batches.

    Masks are filled with 0, integer labels with -100; token ids, token types and floating inputs as the tokenizer
    says. Other integers are filled with what stands where the attention mask is 0, if that is one value, else with 0.
    Any of these is a guess, which `lossk.task.agreement` proves or refuses.

    Args:
        collate: the loader's `collate_fn`.
    """

    def __init__(self, collate: Any) -> None:
        self._collate = collate
        self._tokenizer = next((each for each in _reachable(collate) if _pads(each)), None)
        self.left = getattr(self._tokenizer, "padding_side", "right") == "left"
        self._seen: dict[Path, set[float]] = {}

    def look(self, parts: Mapping[Path, Tensor]) -> None:
        """See what the collator itself has filled in, in one of its batches."""
        masks = [part for path, part in parts.items() if _name(path) == "attention_mask"]
        if len(masks) != 1:
            return
        for path, part in parts.items():
            if part.shape == masks[0].shape and len(self._seen.setdefault(path, set())) < 2:
                self._seen[path].update(part[masks[0] == 0][:64].double().tolist())

    def value(self, path: Path, part: Tensor) -> float:
        """What a part of a batch is filled with."""
        name, whole = _name(path), not (part.is_floating_point() or part.is_complex())
        if part.dtype == torch.bool or "mask" in name:
            return 0
        if whole and (name in LABELS or path == (1,)):
            label = getattr(self._collate, "label_pad_token_id", IGNORED)
            return label if torch.iinfo(part.dtype).min <= label else 0
        for ending, attribute in (("input_ids", "pad_token_id"), ("token_type_ids", "pad_token_type_id")):
            if name.endswith(ending) and isinstance(getattr(self._tokenizer, attribute, None), int):
                return getattr(self._tokenizer, attribute)
        if not whole:
            return float(getattr(self._tokenizer, "padding_value", 0.0))
        seen = self._seen.get(path, set())
        return next(iter(seen)) if len(seen) == 1 else 0


def _name(path: Path) -> str:
    return next((key for key in reversed(path) if isinstance(key, str)), "")


def _pads(item: Any) -> bool:
    """Whether it knows what to pad with."""
    return any(isinstance(getattr(item, name, None), int | float) for name in ("pad_token_id", "padding_value"))


def _reachable(collate: Any) -> list[Any]:
    """A collator's function, object, arguments and closure, and the tokenizers that these hold."""
    found = [collate]
    if isinstance(collate, functools.partial):
        found += [collate.func, *collate.args, *collate.keywords.values()]
    for item in list(found):
        if isinstance(item, MethodType):
            found.append(item.__self__)
        if isinstance(item, FunctionType):
            found += [cell.cell_contents for cell in item.__closure__ or () if cell != CellType()]
    held = [getattr(item, name, None) for item in found for name in HOLDERS]
    return [item for item in [*held, *found] if item is not None]
