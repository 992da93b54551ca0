"""The probe: the losses of all N rows of the kernel at the present weights."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lossk.data.data import Samples
from lossk.data.probe_sets import set_name
from lossk.task.agreement import prove
from lossk.task.task import Task, fitting_batch


@dataclass(frozen=True)
class ProbePart:
    """One set of samples, and which of its tokens are rows of the kernel (all its samples, if `tokens` is None)."""

    name: str  # as messages call it
    samples: Samples
    tokens: Tensor | None = None  # [R, 2] int64, (sample, position) of the unmasked tokens, in this order
    positions: int | None = None  # T

    def __len__(self) -> int:
        return len(self.samples) if self.tokens is None else len(self.tokens)

    def fill(self, task: Task, out: Tensor, stack: Tensor | None = None) -> None:
        """Write the part's losses at `task.flat` into `out` [R] float32, nats; or those of `Task.evaluating`'s stack.

        Raises:
            ValueError: the loss masks other tokens than it did at the trained weights.
        """
        batch, row = fitting_batch(task.passes.probe_batch, self.positions), 0
        with task.evaluating(stack) as rows:
            for start, part in self.samples.batches(batch):
                losses, mask = rows(part)
                if self.tokens is not None and (mask is None or not self._same(mask, start, row)):
                    raise ValueError(
                        f"loss: the mask must depend on the data only, but that of {self.name} samples {start} to "
                        f"{min(start + batch, len(self.samples)) - 1} changed from one pass to another"
                    )
                count = losses.shape[-1]
                out[..., row : row + count] = losses
                row += count

    def _same(self, mask: Tensor, start: int, row: int) -> bool:
        assert self.tokens is not None
        found = mask.nonzero().cpu()
        found[:, 0] += start
        return torch.equal(found, self.tokens[row : row + len(found)]) and self._ends(
            start + len(mask), row + len(found)
        )

    def _ends(self, sample: int, row: int) -> bool:
        """Whether `row` is the first row of `sample` or of a later one."""
        assert self.tokens is not None
        return row == len(self.tokens) or int(self.tokens[row, 0]) >= sample


@dataclass(frozen=True)
class Probe:
    """The rows of the kernel: one set of samples after the other."""

    parts: tuple[ProbePart, ...]
    sets: Mapping[str, slice]  # the rows of each named set; empty for a single, nameless one

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def num_samples(self) -> int:
        return sum(len(part.samples) for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Of all its data; a set that appears twice is held once."""
        return sum(samples.nbytes for samples in {id(part.samples): part.samples for part in self.parts}.values())

    def with_samples(self, change: Callable[[Samples], Samples]) -> Probe:
        """The same rows of samples held in another way; a set that appears twice is changed once."""
        changed = {id(part.samples): part.samples for part in self.parts}
        changed = {key: change(samples) for key, samples in changed.items()}
        parts = (dataclasses.replace(part, samples=changed[id(part.samples)]) for part in self.parts)
        return Probe(tuple(parts), self.sets)

    @property
    def tokens(self) -> Tensor | None:
        """[N, 2] int64: (sample of its set, position) of each row of a loss per token, else None."""
        tokens = [part.tokens for part in self.parts if part.tokens is not None]
        return torch.cat(tokens) if tokens else None

    def holds(self, samples: Samples) -> bool:
        """Whether these are (the very object of) one of its sets."""
        return any(part.samples is samples for part in self.parts)

    def fill(self, task: Task, out: Tensor, stack: Tensor | None = None) -> None:
        """Write the loss of every row at `task.flat` into `out` [N] float32, nats; typically a row of the panel.

        Args:
            stack: [k, P], the weights of k draws to evaluate together instead (`Task.draws_at_a_time`); out is [k, N].
        """
        start = 0
        for part in self.parts:
            part.fill(task, out[..., start : start + len(part)], stack)
            start += len(part)

    def describe(self, row: int) -> str:
        """A row, for messages."""
        for part in self.parts:
            if row < len(part):
                break
            row -= len(part)
        name = "probe" + part.name.removeprefix("loader")
        if part.tokens is None:
            return f"{name} sample {row}"
        return "{} sample {}, position {}".format(name, *part.tokens[row].tolist())


def prepare_probe(task: Task, sets: Mapping[str, Samples], train: Samples) -> tuple[Probe, Samples]:
    """Check model and data at w*, and find the rows; a loss per token then knows its training data (`task.loss`).

    The task is not entered, and comes out with what `lossk.task.agreement.prove` finds of it.

    Args:
        sets: the samples of each set; of a single, nameless one under "".
        train: the training samples; may be one of the sets.

    Returns:
        The probe, and the training samples where the passes want them.

    Raises:
        ValueError: what `prove` refuses, fewer than 2 rows, no unmasked token, or a mask that changes.
    """
    names = {id(samples): set_name(name) for name, samples in sets.items()}
    names.setdefault(id(train), "train")
    placed, positions = prove(task, {names[id(samples)]: samples for samples in (*sets.values(), train)})
    parts = {key: ProbePart(name, placed[name], positions=positions[name]) for key, name in names.items()}
    if any(part.positions is not None for part in parts.values()):
        with task:
            parts = {key: _index(task, part) for key, part in parts.items()}
    per_token = {part.positions is not None for part in parts.values()}
    if len(per_token) > 1:
        kinds = ", ".join(f"{part.name} {'token' if part.positions else 'sample'}" for part in parts.values())
        raise ValueError(f"loss must be of one kind for all data, per sample or per token, got per {kinds}")
    own = parts[id(train)]
    if own.positions is not None:
        task.use_loss(task.loss.over_tokens(len(own), len(own.samples), own.positions))
    rows, start = {}, 0
    for name, samples in sets.items():
        rows[name] = slice(start, start + len(parts[id(samples)]))
        start = rows[name].stop
    if start < 2:
        raise ValueError(f"loader must hold at least 2 {task.loss.unit}, got {start}")
    probe = Probe(tuple(parts[id(samples)] for samples in sets.values()), {} if "" in rows else rows)
    return probe, own.samples


def _index(task: Task, part: ProbePart) -> ProbePart:
    """With its unmasked tokens, found by one pass over all samples and confirmed by another."""
    if part.positions is None:
        return part
    batch, found = fitting_batch(task.passes.probe_batch, part.positions), []
    for start, samples in part.samples.batches(batch):
        _, mask = task.rows(samples)
        if mask is None:
            raise ValueError("loss must always return (losses [B, T], mask [B, T]) or never, got both")
        tokens = mask.nonzero().cpu()
        tokens[:, 0] += start
        found.append(tokens)
    part = ProbePart(part.name, part.samples, torch.cat(found), part.positions)
    if len(part) == 0:
        raise ValueError(
            f"{part.name} must hold at least one unmasked token, got none; the mask is True where it counts"
        )
    part.fill(task, torch.empty(len(part), dtype=torch.float32, device="cpu"))
    return part


def rows_fingerprint(sets: Mapping[str, Samples]) -> str:
    """A digest of the sets' names and data; of a single set, that of its data."""
    if list(sets) == [""]:
        return sets[""].fingerprint()
    digest = hashlib.blake2b(digest_size=16)
    for name, samples in sets.items():
        digest.update(f"{name!r} {samples.fingerprint()}\n".encode())
    return digest.hexdigest()


def token_fingerprint(tokens: Tensor) -> str:
    """A digest of which tokens are rows."""
    return hashlib.blake2b(tokens.numpy().tobytes(), digest_size=16).hexdigest()


def probe_losses(task: Task, samples: Samples, out: Tensor) -> None:
    """Write every sample's share of the training loss at `task.flat` into `out`.

    Args:
        out: [n] float32, nats.
    """
    batch = fitting_batch(task.passes.probe_batch, task.loss.positions)
    for start, part in samples.batches(batch):
        out[start : start + batch] = task.losses(part)


def first_non_finite(losses: Tensor) -> int | None:
    """The index of the first NaN or infinity of a vector, or None."""
    if math.isfinite(float(losses.sum())):  # NaN and infinity survive a sum, and this is one pass without temporaries
        return None
    bad = (~torch.isfinite(losses)).nonzero()
    return int(bad[0]) if bad.numel() else None
