"""Counter-based minibatch indices: a function of (seed, chain, step), drawn without replacement."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lossk.ops.philox import philox4x32

STREAM = 1  # of the Philox counter; 0 is the noise of the step
BLOCK = 32  # steps whose words are generated together: one vectorised call instead of many small ones


class Minibatches:
    """The minibatch of each step, `minibatches[step]` -> [m] int64, sorted.

    Each is a uniformly random m-subset of range(n), independent of the others; with m None or at least n it is all of
    range(n).
    """

    def __init__(self, num_samples: int, batch_size: int | None, *, seed: int, chain: int) -> None:
        self.num_samples = num_samples
        self.batch_size = num_samples if batch_size is None else min(batch_size, num_samples)
        self.seed, self.chain = seed, chain
        self._all = torch.arange(num_samples, device="cpu")
        self._cached: tuple[int, np.ndarray] = (-1, np.empty((0, 0), np.uint64))  # block number, [BLOCK, count]
        self._chosen: tuple[int, np.ndarray] = (-1, np.empty((0, 0), np.int64))  # block number, [BLOCK, m]

    def __getitem__(self, step: int) -> Tensor:
        if self.batch_size == self.num_samples:
            return self._all
        if 4 * self.batch_size > self.num_samples:
            return torch.from_numpy(self._by_sorting(step))
        return torch.from_numpy(self._by_rejection(step))

    def _by_sorting(self, step: int) -> np.ndarray:
        # The index in the low bits makes keys distinct, and a partition of plain integers is far quicker than a sort.
        low = np.uint64((1 << self.num_samples.bit_length()) - 1)
        keys = (self._words(step, self.num_samples) & ~low) | np.arange(self.num_samples, dtype=np.uint64)
        chosen = np.partition(keys, self.batch_size)[: self.batch_size] & low
        return np.sort(chosen.astype(np.int64))

    def _by_rejection(self, step: int) -> np.ndarray:
        block, row = divmod(step, BLOCK)
        if self._chosen[0] != block:
            self._chosen = (block, self._choose_block(block))
        return self._chosen[1][row]

    def _choose_block(self, block: int) -> np.ndarray:
        """The first m distinct values of each step: [BLOCK, m] int64, sorted."""
        count = self.batch_size * 3 // 2 + 32
        while True:
            words = self._block_words(block, count)[:, :count]  # a larger count only appends words
            values = scale_down(words, self.num_samples)
            places = first_occurrences(values)[:, : self.batch_size]
            if (places < count).all():
                return np.sort(np.take_along_axis(values, places, axis=1), axis=1)
            count *= 2

    def _words(self, step: int, count: int) -> np.ndarray:
        """The first `count` 64-bit words of a step: [count] uint64."""
        block, row = divmod(step, BLOCK)
        return self._block_words(block, count)[row, :count]

    def _block_words(self, block: int, count: int) -> np.ndarray:
        """The words of a block's steps: [BLOCK, count or more] uint64."""
        if self._cached[0] != block or self._cached[1].shape[1] < count:
            steps = np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=np.uint32)
            calls = -(-count // 2)  # a Philox call gives two 64-bit words
            counter = np.zeros((BLOCK, calls, 4), np.uint32)
            counter[..., 0] = np.arange(calls, dtype=np.uint32)
            counter[..., 2] = steps[:, None]
            counter[..., 3] = STREAM
            words = philox4x32(counter.reshape(-1, 4), (self.seed, self.chain))
            self._cached = (block, np.ascontiguousarray(words).view(np.uint64).reshape(BLOCK, 2 * calls))
        return self._cached[1]


def first_occurrences(values: np.ndarray) -> np.ndarray:
    """Where each distinct value of a row [r, k] first appears, in order: [r, k] int64, filled with k; values < 2^32."""
    count = values.shape[1]
    keys = np.sort((values << 32) | np.arange(count), axis=1)
    places = keys & 0xFFFFFFFF
    places[:, 1:][keys[:, 1:] >> 32 == keys[:, :-1] >> 32] = count
    return np.sort(places, axis=1)


def scale_down(words: np.ndarray, n: int) -> np.ndarray:
    """floor(words * n / 2^64) for uint64 words and n < 2^32: [k] int64 in [0, n), biased by less than n / 2^64."""
    high, low = words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)
    return ((high * np.uint64(n) + ((low * np.uint64(n)) >> np.uint64(32))) >> np.uint64(32)).astype(np.int64)
