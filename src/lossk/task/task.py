"""The frozen model: eval mode, one flat float32 weight buffer, and its exact restoration afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lossk.ambient import usual_modes
from lossk.checks import check_choice
from lossk.data.data import Samples
from lossk.data.streams import streams_kept
from lossk.device import SideStream, pinned
from lossk.float32 import float32_products
from lossk.settings import PRECISIONS
from lossk.task.configured import Configured
from lossk.task.fold import fold_norms
from lossk.task.head import heads_at_a_time
from lossk.task.losses import Loss, Weights
from lossk.task.parameters import check_model, select_parameters
from lossk.task.snapshot import Switch, in_eval_mode

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS_AT_A_TIME = 4096  # positions per pass of a loss per token


class Task(Configured):
    """A model prepared for sampling, as a context manager.

    Inside the `with` block every module is in eval mode (batch norm on its running statistics, no dropout), only the
    selected parameters require grad, and these are views of `flat`: writing `flat` moves the model. Tied weights
    appear once. Whatever the model's dtype, the chain's weights are a float32 master copy. On leaving, by whatever
    way, the model gets back its own tensors, modes, flags and gradients, bit for bit.

    After `rescale` a chain moves in coordinates u, and the model's weights are w = w* + D (u - u*), D a constant of
    each parameter: `flat` and `anchor` are then u and u*, and gradients are D times those of w.

    Attributes:
        flat: [P] float32, the sampled weights w; or u.
        anchor: [P] float32, w*, the weights on entry; or u*.
        grad: [P] float32, where `gradient` leaves the gradient of the minibatch loss.
        scales: D, a number for each sampled parameter, or None where w = u.
        passes: how the passes are run; `use_passes` changes it, outside the `with` block.
    """

    flat: Tensor
    anchor: Tensor
    grad: Tensor
    scales: tuple[float, ...] | None

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        params: Sequence[str] | None = None,
        device: str | torch.device | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__(loss)
        self.model = model
        self.scales = None
        check_model(model)
        self.names, self.sampled = select_parameters(model, params)
        self.device = self.sampled[0].device
        if device is not None:
            try:
                self.device = torch.empty(0, device=device, dtype=torch.float32).device
            except (RuntimeError, TypeError, ValueError, AssertionError) as error:
                raise ValueError(f"device must be a torch device that is here, got {device!r}: {error}") from error
        self.num_weights = sum(p.numel() for p in self.sampled)
        self.switch: Switch = "none"  # how the model goes to eval mode
        self.draws = True  # whether a pass moves a global random stream, which others may be using at the same time
        self.called: dict[str, Any] = {}  # of each data set, what `lossk.task.agreement` compares the passes with
        self.folded = False  # whether any norm is, in the passes of the block
        self.notes: list[str] = []  # why a way of running the model is not used
        self.precision = precision
        self._copies: SideStream | None = None  # of all streamed data
        self.streams = False  # data stay in pinned host memory, and batches come to the device one by one
        self._has_convolutions = any(isinstance(module, nn.Conv2d) for module in model.modules())
        check_choice("precision", precision, PRECISIONS)
        if precision == "tf32" and self.device.type != "cuda":
            raise ValueError(f"precision='tf32' needs a CUDA device, got device {str(self.device)!r}")

    def _prepare(self, network: nn.Module) -> Any:
        """What gradients and probes run."""
        if self.passes.fold_norms and self.rewritable:
            folded = fold_norms(network, self.arguments)
            self.folded, network = self.folded or folded is not None, folded or network
        if self.passes.compile == "graphs":
            return torch.compile(network, mode="reduce-overhead")
        return torch.compile(network) if self.passes.compile else network

    @property
    def network(self) -> nn.Module:
        """The model, or its part after a frozen prefix, at the weights that `flat` stands for."""
        self._move()
        return self.model if self.suffix is None else self.suffix

    @property
    def run_model(self) -> Any:
        """The same as the passes run it."""
        self._move()
        return self._prepared

    @property
    def channels_last(self) -> bool:
        """Whether what convolutions read lies channels-last; which elements of `flat` are neighbors is free."""
        wanted = self.passes.memory_format == "channels_last"
        return wanted and self._has_convolutions and self.device.type in ("cpu", "cuda")

    def __enter__(self) -> Task:
        assert self._entered is None, "a task is entered once at a time"
        with ExitStack() as entered:
            entered.enter_context(usual_modes())
            if self.draws:
                entered.enter_context(streams_kept())
            entered.enter_context(in_eval_mode(self.model, self.switch))
            self._freeze()
            if self.passes.num_threads is not None:
                torch.set_num_threads(self.passes.num_threads)
            self.folded = False
            self._prepared = self._prepare(self.network)
            self._run_head = None if self.head is None else self.head.prepared(self._prepare)
            self._entered = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entered, self._entered = self._entered, None
        assert entered is not None
        entered.close()

    def _freeze(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)
            if parameter.is_floating_point():
                parameter.data = self.lay_out(parameter.data.to(self.device, torch.float32))
            else:
                parameter.data = parameter.data.to(self.device)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    dtype = torch.float32 if buffer.is_floating_point() else None
                    module._buffers[name] = buffer.to(self.device, dtype)
        self.anchor = self.flatten([p.data for p in self.sampled])
        self.flat = self.anchor.clone()
        self.grad = torch.zeros_like(self.flat)
        self.scales, self._trained, self._weights, self._elsewhere = None, self.anchor, self.flat, False
        self._parts: list[Tensor] = []  # `grad`, as one view per sampled parameter
        offset = 0
        for parameter in self.sampled:
            span = slice(offset, offset + parameter.numel())
            parameter.requires_grad_(True)
            parameter.data = self._view(self.flat[span], parameter.shape)
            self._parts.append(self._view(self.grad[span], parameter.shape))
            offset += parameter.numel()

    def rescale(self, scales: Sequence[float]) -> None:
        """From now on let chains move in u = w / D, within the block and at w*.

        Args:
            scales: D of each sampled parameter; 0 holds it at w*.
        """
        assert self._entered is not None
        assert self.scales is None
        assert len(scales) == len(self.sampled)
        self.scales = tuple(scales)
        self._weights = self._trained.clone()
        self._parts_of_weights = self._split(self._weights)
        for parameter, part in zip(self.sampled, self._parts_of_weights, strict=True):
            parameter.data = self._view(part, parameter.shape)
        self.anchor = self._trained.clone()
        torch._foreach_mul_(self._split(self.anchor), [1.0 / scale if scale > 0 else 0.0 for scale in scales])
        self.reset()

    def _split(self, flat: Tensor) -> list[Tensor]:
        return list(flat.split([parameter.numel() for parameter in self.sampled]))

    def _move(self) -> None:
        """Take the model to the weights that `flat` stands for, where these are not `flat` itself."""
        if self.scales is None or self._elsewhere:
            return
        torch.sub(self.flat, self.anchor, out=self._weights)
        torch._foreach_mul_(self._parts_of_weights, self.scales)
        self._weights += self._trained  # last: at u* this is w* bit for bit

    def weights(self) -> Tensor:
        """[P] float32: the model's weights w at `flat`; a buffer, not to be written."""
        self._move()
        return self._weights

    def distance(self) -> float:
        """|w - w*| of the model's weights."""
        return float(torch.linalg.vector_norm(self.weights() - self._trained))

    def pull_back(self, gradient: Tensor) -> Tensor:
        """[P]: a gradient with respect to the model's weights, made one with respect to `flat` in place."""
        if self.scales is not None:
            torch._foreach_mul_(self._split(gradient), self.scales)
        return gradient

    def place(self, samples: Samples) -> Samples:
        """Samples on the task's device, or streamed, in the passes' layout and their own dtype (float64 in float32)."""

        def placed(tensor: Tensor) -> Tensor:
            dtype = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
            if samples.spool is not None and (self.streams or self.device.type == "cpu"):
                return samples.spool.changed(tensor, lambda part: self.lay_out(part.to(dtype)))
            if self.streams and tensor.device != self.device:
                return pinned(self.lay_out(tensor.to(dtype=dtype)))
            return self.lay_out(tensor.to(self.device, dtype))

        self._copies = self._copies or (SideStream(self.device) if self.streams else None)
        return samples.placed(placed, self.device, self._copies)

    def lay_out(self, tensor: Tensor) -> Tensor:
        """A tensor in the memory format the passes run fastest in; values and shape stay."""
        if self.channels_last and tensor.ndim == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def flatten(self, parts: Sequence[Tensor]) -> Tensor:
        """[P]: one tensor per sampled parameter, in the order of `flat`."""
        return torch.cat([self._flatten(dense(part)) for part in parts])

    def _flatten(self, tensor: Tensor) -> Tensor:
        """[p]: a parameter's elements in the order they have in `flat`."""
        if self.channels_last and tensor.ndim == 4:
            tensor = tensor.permute(0, 2, 3, 1)
        return tensor.reshape(-1)

    def _view(self, flat: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `_flatten`, as a view."""
        if self.channels_last and len(shape) == 4:
            out_channels, in_channels, height, width = shape
            return flat.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2)
        return flat.view(shape)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The forward pass's precision; weights, gradients and losses stay float32."""
        dtype = AUTOCAST.get(self.precision or "")
        if dtype is not None:
            with torch.autocast(self.device.type, dtype):
                yield
        elif self.precision == "tf32":
            with float32_products(tf32=True):
                yield
        else:
            yield

    @contextlib.contextmanager
    def reading(self, weights: Tensor) -> Iterator[None]:
        """Have the passes launched inside read their parameters from another buffer [P] like `weights()`.

        A launch takes the addresses it is given: it goes on reading them whatever the parameters are afterwards.
        """
        held = [parameter.data for parameter in self.sampled]
        offset = 0
        for parameter in self.sampled:
            parameter.data = self._view(weights[offset : offset + parameter.numel()], parameter.shape)
            offset += parameter.numel()
        self._elsewhere = True
        try:
            yield
        finally:
            self._elsewhere = False
            for parameter, data in zip(self.sampled, held, strict=True):
                parameter.data = data

    def reset(self) -> None:
        """Return to w*."""
        self.flat.copy_(self.anchor)

    def losses(self, batch: Any) -> Tensor:
        """Each sample's share of the training loss at the present weights: [B] float32, nats."""
        with torch.no_grad(), self.autocast():
            if self._run_head is not None:
                self._move()
                return self.loss.shares(*self._run_head.evaluator()(batch))
            return self.loss.per_sample(self.run_model, batch)

    def rows(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """A batch's rows of the kernel at the present weights: [R] float32, nats; of a loss per token also its mask."""
        with self.evaluating() as rows:
            return rows(batch)

    @contextlib.contextmanager
    def evaluating(self, stack: Tensor | None = None) -> Iterator[Callable[[Any], tuple[Tensor, Tensor | None]]]:
        """`rows` for many batches: what a pass needs around it is entered once.

        Args:
            stack: [k, P], the weights w of k draws that differ in the head only: rows are then [k, R].
        """
        with torch.no_grad(), self.autocast():
            head = self._run_head
            if head is None:
                yield partial(self.loss.rows, self.run_model)
            else:
                if stack is None:
                    self._move()
                evaluate = head.evaluator(None if stack is None else head.heads_of(stack, self.sampled))
                yield lambda batch: self.loss.select(*evaluate(batch))

    def draws_at_a_time(self, most: int) -> int:
        """How many draws a probe pass can evaluate together: several where only a fused head is sampled."""
        if self.head is None or not self.head.takes(self.sampled):
            return 1
        return heads_at_a_time(most, self.num_weights, self.device)

    def stack_bytes(self, most: int) -> int:
        """Of the weights that wait to be evaluated together."""
        together = self.draws_at_a_time(most)
        return 4 * together * self.num_weights if together > 1 else 0

    def gradient(self, samples: Samples, index: Tensor) -> float:
        """Leave the gradient of the mean loss over `index` in `grad`; return that mean loss.

        Args:
            index: [m] int64, the minibatch.
        """
        total = 0.0
        for number, part in enumerate(self.gradient_parts(index)):
            share = len(part) / len(index)
            with torch.enable_grad(), self.autocast():
                value, outputs, slopes = self.loss.differentiable(self.run_model, samples[part])
                if not outputs.requires_grad:
                    raise ValueError("loss must depend on the sampled parameters, but has no gradient")
                if share < 1:
                    outputs, slopes = (outputs * share, None) if slopes is None else (outputs, slopes * share)
                self.differentiate(outputs, slopes, add=number > 0)
            total += share * float(value)
        return total

    def weighted_gradient(self, samples: Samples, index: Tensor, weights: Weights) -> tuple[float, Tensor]:
        """Leave the gradient of sum_i a_i loss_i over `index` in `grad`; return the mean loss, and the a_i.

        Args:
            index: [m] int64, the minibatch.
            weights: the a_i, or how they follow from the losses of a minibatch that is `in_one_pass`.
        """
        parts = self.gradient_parts(index)
        sizes = [len(part) for part in parts]
        given = weights.split(sizes) if isinstance(weights, Tensor) else [weights]
        total, used = 0.0, []
        for number, (part, own) in enumerate(zip(parts, given, strict=True)):
            with torch.enable_grad(), self.autocast():
                losses, applied, outputs, slopes = self.loss.weighted(self.run_model, samples[part], own)
                if not outputs.requires_grad:
                    raise ValueError("loss must depend on the sampled parameters, but has no gradient")
                self.differentiate(outputs, slopes, add=number > 0)
            total += float(losses.double().sum())
            used.append(applied)
        return total / len(index), torch.cat(used)

    def gradient_parts(self, index: Tensor) -> Sequence[Tensor]:
        """A minibatch as its gradient takes it."""
        return index.split(fitting_batch(self.passes.gradient_batch, self.loss.positions))

    def in_one_pass(self, index: Tensor) -> bool:
        """Whether the gradient takes all of a minibatch at once."""
        return len(index) <= fitting_batch(self.passes.gradient_batch, self.loss.positions)

    def differentiate(self, value: Tensor, slopes: Tensor | None = None, *, add: bool) -> None:
        """Write the gradient of a scalar, or of slopes . value, into `grad`, or add it there."""
        found = torch.autograd.grad(value, self.sampled, slopes, allow_unused=True, materialize_grads=True)
        gradients = [dense(part) for part in found]
        if self.scales is not None:  # not in place: two parameters may have been given one and the same memory
            gradients = list(torch._foreach_mul(gradients, list(self.scales)))
        # One pass over the weights: .grad, which autograd adds to, would have to be zeroed, read and written.
        write = torch._foreach_add_ if add else torch._foreach_copy_
        write(self._parts, gradients)


def dense(gradient: Tensor) -> Tensor:
    """A gradient as a dense tensor; that of an embedding may be sparse."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def fitting_batch(most: int, positions: int | None) -> int:
    """Samples per pass: `most`, or fewer where each of them has many positions."""
    return most if positions is None else max(1, min(most, TOKENS_AT_A_TIME // max(positions, 1)))
