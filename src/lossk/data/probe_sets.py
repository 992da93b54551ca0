"""Several probe sets in one run: one after the other they are the rows of one kernel."""

from __future__ import annotations

from typing import Any

from lossk.data.data import Samples, Transform
from lossk.data.reading import check_source, read_samples
from lossk.data.room import Room
from lossk.timings import Progress


class ProbeSets:
    """Named probe sets, for `build_kernel(model, ProbeSets(train=a, test=b), train=a)`.

    The kernel's rows are the sets one after the other, in the order given; `kernel.sets[name]` is the slice of a set's
    rows, so that `kernel[kernel.sets["test"], kernel.sets["train"]]` is the block between two sets. The sets may differ
    in length and shape, as long as the model and the loss take each of them.

    Args:
        sets: each a DataLoader, a Dataset or a tuple (inputs, targets) of tensors, as for `build_kernel`. The same
            object given twice (or also as `train`) is read and held once.

    Raises:
        ValueError: no set, or one without a name.
        TypeError: a set that is itself a ProbeSets, or None.
    """

    def __init__(self, /, **sets: Any) -> None:
        if not sets:
            raise ValueError("ProbeSets must hold at least one set, as name=samples, got none")
        for name, samples in sets.items():
            if not name:
                raise ValueError("ProbeSets: a set must have a name, got ''")
            if samples is None or isinstance(samples, ProbeSets):
                raise TypeError(
                    f"ProbeSets: {name} must be a DataLoader, a Dataset or a tuple (inputs, targets) of tensors, "
                    f"got {type(samples).__name__}"
                )
        self.sets: dict[str, Any] = dict(sets)

    def __repr__(self) -> str:
        return f"ProbeSets({', '.join(self.sets)})"


def read_sources(
    loader: Any,
    train: Any,
    transform: Transform | None = None,
    *,
    name: str = "loader",
    bar: Progress | None = None,
    room: Room | None = None,
    pads: bool = False,
) -> tuple[dict[str, Samples], Samples]:
    """Read the probe (a lone one under the name "") and the training data; what is given twice is read once.

    Args:
        name: of the public argument `loader`, for messages.
        bar: where progress is shown.
        room: what the call may read, and where to; None is into what is free of memory.
        pads: as for `read_samples`.

    Raises:
        ValueError: `train` is None where the probe is several sets; what `read_samples` refuses.
        TypeError: a transform that cannot be called; what `read_samples` refuses.
        MemoryError: more data than there is room for.
    """
    if isinstance(loader, ProbeSets) and train is None:
        raise ValueError("train must be given with ProbeSets: it says which data the training loss is over, got None")
    if transform is not None and not callable(transform):
        raise TypeError(f"transform must be callable or None, got {type(transform).__name__}")
    sources = dict(loader.sets) if isinstance(loader, ProbeSets) else {"": loader}
    called = {key: name + set_name(key).removeprefix("loader") for key in sources}
    given = [(source, called[key]) for key, source in sources.items()]
    if train is not None:
        given.append((train, "train"))
    for source, what in given:  # nothing is read in vain
        check_source(source, what)
    read: dict[int, Samples] = {}
    room = room or Room()
    for source, what in given:
        if id(source) not in read:
            read[id(source)] = read_samples(source, what, bar=bar, room=room, pads=pads).transformed(transform, what)
    sets = {key: read[id(source)] for key, source in sources.items()}
    return sets, read[id(loader if train is None else train)]


def set_name(name: str) -> str:
    """What messages call a set of the `loader` argument."""
    return f"loader set {name!r}" if name else "loader"
