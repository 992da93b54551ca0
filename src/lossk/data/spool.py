"""Tensors in mapped files, for data that are larger than memory.

A file has no name from the moment it is made, so nothing is left of it, however the process ends. Its pages count as
resident while they are mapped: they are let go after every few megabytes that are read or written. The numbers stay in
the file, and come back when they are touched again. Samples here and there are read without being mapped, since the
system maps up to 2 MB around each.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from lossk.available import gigabytes

MOST_MAPPED = 2**23  # bytes that are touched until pages are let go
PIECE = 2**21  # bytes that are copied or looked at in one go
DISK_SHARE = 0.9  # of what is free on a disk, that data may take
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


class Spool:
    """Makes tensors in unnamed files, and keeps what is mapped of them small.

    Args:
        folders: where files may lie; the first that is on a disk is taken.
    """

    def __init__(self, *folders: Path) -> None:
        on_disk = [folder for folder in folders if folder.is_dir() and not _in_memory(folder)]
        self.folder = (on_disk or [Path(tempfile.gettempdir())])[0]
        self.usable = bool(on_disk)
        self._files: weakref.WeakKeyDictionary[mmap.mmap, _File] = weakref.WeakKeyDictionary()
        self._touched = 0

    @property
    def free(self) -> int:
        """Bytes that may still be taken on the disk."""
        return int(DISK_SHARE * psutil.disk_usage(str(self.folder)).free) if self.usable else 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros in a file of its own, whose room on the disk is taken at once.

        Raises:
            OSError: the disk is full.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        with tempfile.TemporaryFile(dir=self.folder, prefix="lossk-", buffering=0) as file:
            if hasattr(os, "posix_fallocate"):  # else a page that finds no room is a crash
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            mapped = mmap.mmap(file.fileno(), size)
            descriptor = os.dup(file.fileno())
        weakref.finalize(mapped, os.close, descriptor).atexit = False
        flat = torch.frombuffer(mapped, dtype=dtype)
        self._files[mapped] = _File(descriptor, range(flat.data_ptr(), flat.data_ptr() + size))
        return flat.view(shape)

    def touched(self, count: int) -> None:
        """So many bytes were read or written since."""
        self._touched += count
        if self._touched > MOST_MAPPED:
            self._touched = 0
            for mapped in list(self._files):
                mapped.madvise(mmap.MADV_DONTNEED)  # of a shared mapping: what was written is in the file

    def take(self, tensor: Tensor, index: Tensor) -> Tensor:
        """`tensor[index]` of a tensor in a file, read without mapping it.

        Args:
            index: [k] int64.
        """
        file = next((each for each in self._files.values() if tensor.data_ptr() in each.addresses), None)
        if file is None or len(index) == 0:  # of no size
            return tensor[index]
        each = tensor[0].numel() * tensor.element_size()
        assert tensor.stride(0) == tensor[0].numel(), "samples must lie one after the other"
        start = tensor.data_ptr() - file.addresses.start
        taken = torch.empty(len(index) * each, dtype=torch.uint8, device="cpu")
        rows = taken.numpy().data
        for number, row in enumerate(index.tolist()):
            _read_fully(file.descriptor, rows[number * each : (number + 1) * each], start + row * each)
        return taken.view(tensor.dtype).as_strided((len(index), *tensor.shape[1:]), tensor.stride())

    def changed(self, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """`change` of a tensor, sample by sample, in another file; the tensor itself where nothing changes.

        Args:
            change: may give another dtype, and lay images out channels-last.
        """
        one = change(tensor[:1])
        if one.data_ptr() == tensor.data_ptr():
            return tensor
        last = one.ndim == 4 and not one.is_contiguous()
        shape = (len(tensor), *(one.permute(0, 2, 3, 1) if last else one).shape[1:])
        made = self.empty(shape, one.dtype)
        made = made.permute(0, 3, 1, 2) if last else made
        for span in pieces(tensor):
            made[span] = change(tensor[span])
            self.touched(2 * PIECE)
        return made


@dataclass(frozen=True)
class _File:
    descriptor: int
    addresses: range  # where it is mapped


def _read_fully(descriptor: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(f"a file of spooled data ends at byte {offset + done}")
        done += count


def pieces(tensor: Tensor) -> Iterator[slice]:
    """Consecutive samples of a tensor, a few megabytes at a time."""
    each = max(tensor[:1].numel() * tensor.element_size(), 1)
    step = max(1, PIECE // each)
    for start in range(0, len(tensor), step):
        yield slice(start, min(start + step, len(tensor)))


def folders(beside: Path | None) -> list[Path]:
    """Where files may lie: beside a store, or in the folders for temporary files."""
    near = [] if beside is None else [next(parent for parent in beside.absolute().parents if parent.exists())]
    return [*near, Path(tempfile.gettempdir()), Path("/var/tmp")]


def in_words(spool: Spool, size: int) -> str:
    """Where data of so many bytes lie."""
    return f"{gigabytes(size)} in mapped files in {spool.folder}"


def _in_memory(folder: Path) -> bool:
    """Whether its files lie in memory."""
    folder, kinds = folder.resolve(), {}
    for part in psutil.disk_partitions(all=True):
        kinds[Path(part.mountpoint)] = part.fstype
    found = next((kinds[each] for each in (folder, *folder.parents) if each in kinds), "")
    return found in IN_MEMORY
