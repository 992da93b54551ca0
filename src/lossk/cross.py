"""`cross_kernel`: the rectangular kernel between training and query samples, which is their Bayesian influence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lossk.ambient import usual_modes
from lossk.build import sample_losses
from lossk.checks import check_choice, check_instance, check_tensor
from lossk.data.data import Transform
from lossk.data.probe_sets import ProbeSets
from lossk.data.reading import check_source, read_samples
from lossk.data.trees import map_tensors
from lossk.diagnostics.diagnostics import Diagnostics
from lossk.kernel.dense import AsArray, refuse_too_large
from lossk.kernel.indexing import resolve, rows_and_columns
from lossk.kernel.kernel import LossKernel
from lossk.optional import check_run
from lossk.run.allocation import shortage_named
from lossk.samplers.samplers import Sampler
from lossk.settings import CENTERINGS
from lossk.task.losses import LossFunction
from lossk.task.passes import Passes
from lossk.timings import Progress


@usual_modes()
def cross_kernel(
    model: nn.Module,
    train: Any,
    query: Any,
    *,
    rows: Any = None,
    loss: str | LossFunction = "cross_entropy",
    transform: Transform | None = None,
    sampler: Sampler | None = None,
    params: Sequence[str] | None = None,
    num_chains: int = 4,
    num_draws: int = 200,
    centering: str = "chain",
    backend: str = "auto",
    device: str | torch.device | None = None,
    precision: str | None = None,
    passes: Passes | None = None,
    seed: int = 0,
    progress: bool = True,
) -> CrossKernel:
    """K_ij = Cov(loss of training sample i, loss of query sample j) over draws around the trained weights, in one run.

    -K is the Bayesian influence function (Kreer et al., arXiv 2509.26544): with epsilon l_i added to n_beta L_n, the
    expected loss of query j changes by -epsilon K_ij. So where K_ij > 0 training sample i *helps* query j. Its weight
    in n_beta L_n is n_beta / n (n training samples): to first order, leaving it out raises the loss of j by
    (n_beta / n) K_ij.

    Args:
        model: the trained network; given back bit-identical, whatever happens.
        train: the data that defines the training loss L_n, of which the rows are: a DataLoader, a Dataset or a tuple
            (inputs, targets) of tensors.
        query: the samples whose losses are asked about, in the same forms: the columns.
        rows: the training samples that become rows: integers, a slice, or a mask [n]; None is all of them. L_n is over
            all of `train` either way; each draw costs a forward pass over the rows and the query.
        loss, transform, sampler, params, num_chains, num_draws, centering, backend, device, precision, passes, seed,
            progress: as in `build_kernel`.

    Returns:
        A CrossKernel [rows, query], in nats^2. It keeps the draws' losses, 4 bytes per draw and sample; nothing of size
        rows x rows is formed.

    Raises:
        ValueError, TypeError, IndexError: a bad argument, before sampling starts.
        MemoryError: the data or the draws' losses would not fit.
        DivergedError: a chain left the neighborhood of the trained weights.
        BackendError: an explicit backend cannot run here.
    """
    centering = check_choice("centering", centering, CENTERINGS)
    check_run(stored=False)
    for name, data in (("train", train), ("query", query)):
        if data is None or isinstance(data, ProbeSets):
            kind = type(data).__name__
            raise TypeError(
                f"{name} must be a DataLoader, a Dataset or a tuple (inputs, targets) of tensors, got {kind}"
            )
        check_source(data, name)
    shown, index = train, None
    if rows is not None:
        with Progress(progress) as bar:
            read = read_samples(train, "train", bar=bar)
        index = resolve(rows, len(read), "rows")
        if len(index) == 0:
            raise ValueError("rows must select at least one training sample, got none")
        # What was read is passed on, so that a loader is read once and its random augmentation drawn once.
        train, shown = read, map_tensors(lambda t: t[index.to(t.device)], read.tree)
    traces = sample_losses(
        model,
        ProbeSets(train=shown, query=query),
        train=train,
        loss=loss,
        transform=transform,
        sampler=sampler,
        params=params,
        num_chains=num_chains,
        num_draws=num_draws,
        backend=backend,
        device=device,
        precision=precision,
        passes=passes,
        seed=seed,
        progress=progress,
    )
    with shortage_named():
        kernel = LossKernel._of_traces(traces, centering, overwrite=True)
    samples = index if kernel.tokens is None else None
    return CrossKernel(kernel, kernel.sets["train"], kernel.sets["query"], samples=samples)


class CrossKernel(AsArray):
    """The block of a loss kernel between training samples (rows) and query samples (columns), read like a kernel.

    Args:
        kernel: that holds both, from `build_kernel(model, ProbeSets(...), train=...)`, a store, or traces.
        train, query: the name of a set of the kernel, or any index that `kernel[...]` takes.
        samples: the number of each row's sample in the training data; None: the row's number within its set (of an
            index: the kernel's own row number).

    Raises:
        ValueError: no such set, or no samples.
        IndexError: out of range.
    """

    def __init__(
        self, kernel: LossKernel, train: Any = "train", query: Any = "query", *, samples: Tensor | None = None
    ) -> None:
        self.kernel: LossKernel = check_instance("kernel", kernel, LossKernel)
        self._train, of_set = _rows_of(kernel, "train", train)
        self._query, query_of_set = _rows_of(kernel, "query", query)
        self.train_samples = of_set if samples is None else self._check_samples(samples)  # [n] int64
        self.query_samples = query_of_set  # [q] int64

    def _check_samples(self, samples: Any) -> Tensor:
        if self.kernel.tokens is not None:
            raise ValueError("samples must be None where rows are tokens, which say themselves what they are of")
        numbers = check_tensor("samples", samples, (self.num_train,), of="an integer").to("cpu", torch.int64)
        if (numbers < 0).any():
            raise ValueError(f"samples must be at least 0, got {int(numbers.min())}")
        return numbers

    @property
    def num_train(self) -> int:
        """n, the rows: training samples or, of a loss per token, tokens."""
        return len(self._train)

    @property
    def num_query(self) -> int:
        """q, the columns."""
        return len(self._query)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, q)."""
        return self.num_train, self.num_query

    def to_numpy(self) -> np.ndarray:
        """All covariances: [n, q] float32. Refuses, with the size, what free memory cannot hold.

        Raises:
            MemoryError: the matrix needs more than the memory now available.
        """
        refuse_too_large(*self.shape, "read blocks, cross[train, query]")
        return self[:, :].numpy()

    @property
    def diagnostics(self) -> Diagnostics | None:
        """Of the run: its verdict says whether the draws can be trusted."""
        return self.kernel.diagnostics

    @property
    def meta(self) -> dict[str, Any]:
        """Configuration, versions and timings of the run."""
        return self.kernel.meta

    @property
    def train_variance(self) -> Tensor:
        """[n] float64, nats^2: K_ii of the training samples, their self-influence."""
        return self.kernel.variance[self._train]

    @property
    def query_variance(self) -> Tensor:
        """[q] float64, nats^2."""
        return self.kernel.variance[self._query]

    @property
    def train_mean_loss(self) -> Tensor:
        """[n] float64, nats: averaged over the draws."""
        return self.kernel.mean_loss[self._train]

    @property
    def query_mean_loss(self) -> Tensor:
        """[q] float64, nats."""
        return self.kernel.mean_loss[self._query]

    @property
    def noise_floor(self) -> Tensor:
        """[q] float32: the correlation that the best of n unrelated training samples would reach with each query."""
        return self.kernel._chance.of(self._query, among=self._train).floor()

    def __getitem__(self, key: Any) -> Tensor:
        """Covariances `cross[train, query]` (or `cross[train]`): [r, c] float32, nats^2. Positive: helpful."""
        rows, columns = rows_and_columns(key)
        return self.kernel[self._at(rows, columns)]

    def influence(self, rows: Any = slice(None), columns: Any = slice(None)) -> Tensor:
        """The Bayesian influence function BIF_ij = -K_ij: [r, c] float32, nats^2. Negative: sample i lowers loss j."""
        return -self[rows, columns]

    def correlation(self, rows: Any = slice(None), columns: Any = slice(None)) -> Tensor:
        """R_ij = K_ij / sqrt(K_ii K_jj): [r, c] float32 in [-1, 1], 0 where a loss never varied."""
        return self.kernel.correlation(*self._at(rows, columns))

    def standard_error(
        self, rows: Any = slice(None), columns: Any = slice(None), *, correlation: bool = False, method: str = "auto"
    ) -> Tensor:
        """Monte Carlo standard error of the covariances (or correlations): `LossKernel.standard_error`."""
        return self.kernel.standard_error(*self._at(rows, columns), correlation=correlation, method=method)

    def _at(self, rows: Any, columns: Any) -> tuple[Tensor, Tensor]:
        return (
            self._train[resolve(rows, self.num_train, "rows")],
            self._query[resolve(columns, self.num_query, "columns")],
        )

    def __repr__(self) -> str:
        return f"CrossKernel({self.num_train} x {self.num_query} of {self.kernel!r})"


def _rows_of(kernel: LossKernel, name: str, which: Any) -> tuple[Tensor, Tensor]:
    """Rows of the kernel, and their numbers within their set."""
    if isinstance(which, str):
        if which not in kernel.sets:
            there = ", ".join(kernel.sets) or "none: it was built from a single probe"
            raise ValueError(f"{name} must name a set of the kernel, got {which!r}; its sets are {there}")
        which = kernel.sets[which]
    sets = [span for span in kernel.sets.values() if span == which] if isinstance(which, slice) else []
    rows = resolve(which, kernel.num_samples, name)
    if len(rows) == 0:
        raise ValueError(f"{name} must select at least one sample, got none")
    return rows, rows - (sets[0].start if sets else 0)
