"""The Fisher matrix of a task's loss at w*: Kronecker factors of linear and convolution layers, or its diagonal.

C = (1/m) sum_i grad l_i(y_i) grad l_i(y_i)' over up to 2,048 training samples. For the losses that are negative log
likelihoods the labels y_i are drawn from the model itself, so that C is the Fisher matrix, which equals the generalised
Gauss-Newton matrix of L_n: one draw per sample for "cross_entropy" (its softmax) and for "mse" (mean over k outputs: a
Gaussian of variance k/2). For a loss of the caller's own the data's labels stand in: the *empirical* Fisher, which is
small where the model fits well.

K-FAC: with inputs a (1 appended for a bias) and gradients g of a layer's outputs, C of the layer is taken to be
E[a a'] x E[g g'] (Martens and Grosse 2015, arXiv 1503.05671); positions of a convolution or of a sequence count as
further inputs, their gradients as uncorrelated (Grosse and Martens 2016, arXiv 1602.01407). Blocks between layers are
left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossk.data.data import Samples
from lossk.data.minibatches import Minibatches
from lossk.ops.philox import normals, uint32_stream
from lossk.task.losses import forward, split_batch
from lossk.task.task import Task

NUM_SAMPLES = 2048
BATCH = 128
LARGEST_SIDE = 4096  # of a Kronecker factor: beyond it eigenvectors cost more than the chain, and the layer is diagonal
STREAM = 6  # of the Philox counter: labels
SUBSET_CHAIN = 2**32 - 2  # of the counter-based minibatches: neither a chain of a run nor the pilot's


@dataclass
class Layer:
    """A layer with Kronecker factors, and what the last pass left of it."""

    name: str
    module: nn.Linear | nn.Conv2d
    weight: int  # its place in task.sampled
    bias: int | None  # likewise; None where the bias is not sampled
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def members(self) -> list[int]:
        """Places in task.sampled of the parameters it covers."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def matrix(self) -> tuple[int, int]:
        """(outputs o, inputs d) of its weight matrix, a column for the bias included."""
        out, rest = self.module.weight.shape[0], self.module.weight[0].numel()
        return out, rest + (self.bias is not None)

    def rows(self) -> tuple[Tensor, int]:
        """The last inputs as rows: ([B T, d], T), with T positions per sample."""
        a = self.inputs[0]
        if isinstance(self.module, nn.Conv2d):
            mode = self.module.padding_mode
            a = F.pad(a, self.module._reversed_padding_repeated_twice, mode="constant" if mode == "zeros" else mode)
            a = F.unfold(
                a, self.module.kernel_size, dilation=self.module.dilation, stride=self.module.stride
            ).transpose(1, 2)
        positions = a[0].numel() // a.shape[-1]
        a = a.reshape(-1, a.shape[-1])
        if self.bias is not None:
            a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
        return a, positions

    def output_rows(self, gradient: Tensor) -> Tensor:
        """[B T, o]: gradients of its outputs as rows."""
        if isinstance(self.module, nn.Conv2d):
            gradient = gradient.flatten(2).transpose(1, 2)
        return gradient.reshape(-1, gradient.shape[-1])


class FisherSamples:
    """The training samples used, and the noise of their labels."""

    def __init__(self, task: Task, train: Samples, seed: int, most: int = NUM_SAMPLES) -> None:
        self.task, self.train = task, train
        self.index = Minibatches(len(train), most, seed=seed, chain=SUBSET_CHAIN)[0]
        m = len(self.index)
        self.noise = torch.zeros(m, 0, dtype=torch.float32, device="cpu")  # [m, k]
        if task.loss.name == "cross_entropy":
            words = uint32_stream(seed, SUBSET_CHAIN, 0, STREAM, m)
            self.noise = ((torch.from_numpy(words.astype("float64")) + 0.5) / 2**32)[:, None]
        elif task.loss.name == "mse":
            with torch.no_grad():
                k = forward(task.network, split_batch(train[self.index[:1]])[0]).numel()
            self.noise = normals(seed, SUBSET_CHAIN, 0, m * k, stream=STREAM).view(m, k)
        self.noise = self.noise.to(task.device)

    def __len__(self) -> int:
        return len(self.index)

    def losses(self, start: int, stop: int) -> Tensor:
        """[stop - start]: losses of these samples with their labels, differentiable."""
        batch, noise = self.train[self.index[start:stop]], self.noise[start:stop]
        with torch.enable_grad():
            if self.task.loss.name not in ("cross_entropy", "mse"):
                return self.task.loss.per_sample(self.task.network, batch)
            outputs = forward(self.task.network, split_batch(batch)[0]).float()
            if self.task.loss.name == "cross_entropy":
                below = outputs.detach().double().softmax(dim=1).cumsum(dim=1) < noise
                labels = below.sum(dim=1).clamp(max=outputs.shape[1] - 1)
                return F.cross_entropy(outputs, labels, reduction="none")
            outputs = outputs.reshape(len(noise), -1)
            labels = outputs.detach() + math.sqrt(outputs.shape[1] / 2) * noise
            return (outputs - labels).square().mean(dim=1)


def kronecker_layers(task: Task, samples: FisherSamples) -> list[Layer]:
    """Linear and Conv2d layers (one group) whose sampled weight no other module shares, called once per pass."""
    place = {id(parameter): i for i, parameter in enumerate(task.sampled)}
    owners: dict[int, int] = {}
    for module in task.model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = []
    for name, module in task.model.named_modules():
        if type(module) not in (nn.Linear, nn.Conv2d) or owners[id(module.weight)] > 1:
            continue
        if id(module.weight) not in place or getattr(module, "groups", 1) != 1:
            continue
        alone = module.bias is not None and id(module.bias) in place and owners[id(module.bias)] == 1
        layer = Layer(name, module, place[id(module.weight)], place[id(module.bias)] if alone else None)
        if max(layer.matrix()) <= LARGEST_SIDE:
            found.append(layer)
    size = min(2, len(samples))
    with _recording(found):
        samples.losses(0, size)
        return [layer for layer in found if len(layer.outputs) == 1 and len(layer.outputs[0]) == size]


def kronecker_factors(layers: Sequence[Layer], samples: FisherSamples) -> list[tuple[Tensor, Tensor]]:
    """(E[a a'] [d, d], E[g g'] [o, o]) of each layer, float64."""
    sides = [layer.matrix() for layer in layers]
    device = samples.task.device
    factors = [
        (torch.zeros(d, d, dtype=torch.float64, device=device), torch.zeros(o, o, dtype=torch.float64, device=device))
        for o, d in sides
    ]
    m = len(samples)
    for start in range(0, m if layers else 0, BATCH):
        with _recording(layers):
            losses = samples.losses(start, min(start + BATCH, m))
            outputs = [layer.outputs[0] for layer in layers]
            gradients = torch.autograd.grad(losses.sum(), outputs, allow_unused=True, materialize_grads=True)
            for layer, gradient, (of_inputs, of_outputs) in zip(layers, gradients, factors, strict=True):
                a, positions = layer.rows()
                g = layer.output_rows(gradient)
                of_inputs += (a.T @ a).double() / (m * positions)
                of_outputs += (g.T @ g).double() / m
    return factors


def fisher_diagonal(places: Sequence[int], samples: FisherSamples) -> list[Tensor]:
    """Mean square gradient of the parameters at these places of task.sampled, each of its shape, float64."""
    parameters = [samples.task.sampled[i] for i in places]
    total = [torch.zeros(p.shape, dtype=torch.float64, device=p.device) for p in parameters]
    for i in range(len(samples) if parameters else 0):  # one at a time: any model, whatever its operations
        loss = samples.losses(i, i + 1).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for sum_, gradient in zip(total, gradients, strict=True):
            sum_ += gradient.double().square() / len(samples)
    return total


@contextmanager
def _recording(layers: Sequence[Layer]) -> Iterator[None]:
    """Keep inputs and outputs of the layers' calls within the block."""

    def keep(layer: Layer):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            layer.inputs.append(arguments[0].detach())
            layer.outputs.append(output)
            return output.clone()  # an in-place activation then leaves the recorded output alone

        return hook

    handles = [layer.module.register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.inputs, layer.outputs = [], []
