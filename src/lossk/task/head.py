"""The linear head at a model's end: found, taken off, and its losses formed without its logits.

A classifier or a language model ends in `linear(hidden)`. Where this is so, the probe runs the rest of the model (the
*body*) to the hidden states and hands them to the op `head_loss`. Where nothing but the head is sampled, the hidden
states are the same at every draw, and one pass serves the heads of many draws.

The head is found by tracing the model (torch.fx), or else as the linear layer whose output object the model returns.
Either way it is tried at the trained weights on a few samples first: the layer's output must be the model's own bit for
bit, and the losses must agree within the rounding of both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from lossk.ops.head_loss import head_loss
from lossk.ops.sample_loss import IGNORED
from lossk.task.frozen import Frozen
from lossk.task.losses import Evaluated, forward, split_batch
from lossk.task.prefix import ModuleInputs, absent_arguments

NAMES = ("cross_entropy", "token_cross_entropy")  # the losses that `head_loss` is
STACK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}  # of the weights of heads that wait to be evaluated together
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of hidden states and heads, by the precision of the passes


class NoHead(Exception):
    """The model has no head that can be taken off, and why."""


@dataclass(frozen=True)
class Head:
    """A model in two parts: `linear(body(inputs))` is what it gives, a tensor [B, C] or [B, T, C]."""

    linear: nn.Linear
    body: Callable[[Any], Tensor]  # a batch of inputs -> hidden states [B, d] or [B, T, d]
    module: nn.Module | None  # the body, where it is a module of its own (which can be compiled, or folded)
    alone: bool  # whether the body has no use for the head's weights

    def prepared(self, prepare: Callable[[nn.Module], Any]) -> Head:
        """With its body as the passes run it."""
        if self.module is None:
            return self
        return dataclasses.replace(self, body=partial(forward, prepare(self.module)))


def find_head(network: nn.Module, inputs: Any, *, traced: bool = True) -> Head:
    """Take the head off a model (eval mode, weights and data in place).

    Args:
        inputs: of a few samples.
        traced: whether it may be taken off by tracing, which calls the model's modules in another way.

    Raises:
        NoHead: it does not end in a plain linear layer, or that cannot be seen.
    """
    if type(network) is nn.Linear:
        return _proven(Head(_usable(network), _only, None, True), network, inputs)
    reasons = []
    for attempt in (_by_tracing, _by_its_output) if traced else (_by_its_output,):
        try:
            return _proven(attempt(network, inputs), network, inputs)
        except NoHead as reason:
            reasons.append(str(reason))
        except Exception as error:  # whatever tracing a stranger's model raises
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0])
    raise NoHead("; ".join(dict.fromkeys(reasons)))


def _only(inputs: Any) -> Tensor:
    """The hidden states of a network that is nothing but the head."""
    return inputs[0] if isinstance(inputs, tuple | list) else inputs


def _usable(layer: nn.Module) -> nn.Linear:
    # A subclass (a parametrised or adapted layer) may compute anything; hooks too.
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        raise NoHead("what the model returns does not come from a plain linear layer")
    return layer


def _proven(head: Head, network: nn.Module, inputs: Any) -> Head:
    with torch.no_grad():
        whole = forward(network, inputs)
        hidden = head.body(inputs)
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != whole.shape[:-1]:
            raise NoHead("the hidden states are not one row per row of logits")
        if not torch.equal(head.linear(hidden), whole):
            raise NoHead("body and head do not give what the whole model gives")
    return head


def _by_tracing(network: nn.Module, inputs: Any) -> Head:
    graph = fx.Tracer().trace(network, absent_arguments(network, inputs))
    output = next(node for node in graph.nodes if node.op == "output")
    last = output.args[0]
    if not isinstance(last, fx.Node) or last.op != "call_module" or len(last.args) != 1 or last.kwargs:
        raise NoHead("what the model returns does not come from a plain linear layer")
    linear = _usable(network.get_submodule(str(last.target)))
    body = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node is not last and node is not output:
            copies[node] = body.node_copy(node, lambda n: copies[n])
    hidden = last.args[0]
    assert isinstance(hidden, fx.Node)
    body.output(copies[hidden])
    module = fx.GraphModule(network, body)
    shared = {id(p) for p in linear.parameters()} & {id(p) for p in module.parameters()}
    return Head(linear, partial(forward, module), module, not shared)


def _by_its_output(network: nn.Module, inputs: Any) -> Head:
    """The linear layer that is called once and whose output object is what the model returns."""
    called: list[tuple[nn.Module, Any]] = []
    layers = [module for module in network.modules() if type(module) is nn.Linear]
    hooks = [layer.register_forward_hook(lambda module, _, out: called.append((module, out))) for layer in layers]
    try:
        with torch.no_grad():
            logits = forward(network, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    makers = [module for module, out in called if out is logits]
    if len(makers) != 1 or sum(module is makers[0] for module, _ in called) != 1:
        raise NoHead("no linear layer is called once and gives the very tensor that the model returns")
    linear, own = _usable(makers[0]), {id(p) for p in makers[0].parameters()}
    others = (module for module in network.modules() if module is not linear)
    shared = any(id(p) in own for module in others for p in module._parameters.values())
    stopped = ModuleInputs(network, linear)
    return Head(linear, lambda batch: stopped(batch)[0], None, not shared)


@dataclass(frozen=True)
class FusedHead:
    """The losses of a model from its hidden states, under its own head or under each of several.

    Args:
        tokens: the loss is one per token.
        backend: of `head_loss`.
        precision: of the passes: None, "tf32", "bf16" or "fp16".
        frozen: the calls of frozen modules that passes do without.
    """

    head: Head
    tokens: bool
    backend: str
    precision: str | None
    frozen: Frozen | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and head as the op takes them; its sums are float32."""
        return DTYPES.get(self.precision or "", torch.float32)

    @property
    def products(self) -> str:
        """The op's precision: float32 products of a GPU are made of three tf32 ones, off by 2^-21 of a term."""
        return "tf32" if self.precision == "tf32" else "tf32x3"

    def prepared(self, prepare: Callable[[nn.Module], Any]) -> FusedHead:
        """With its body as the passes run it."""
        return dataclasses.replace(self, head=self.head.prepared(prepare))

    def evaluator(self, heads: tuple[Tensor, Tensor | None] | None = None) -> Callable[[Any], Evaluated]:
        """What gives a batch's losses and mask at the present weights; the head is converted once.

        Args:
            heads: weights [k, C, d] and biases [k, C] to use instead; losses are then [k, B] (or [k, B, T]).
        """
        linear = self.head.linear
        weight, bias = (linear.weight, linear.bias) if heads is None else heads
        run = partial(self._losses, weight.detach().to(self.dtype), None if bias is None else bias.to(self.dtype))
        return run if self.frozen is None else self.frozen.armed(run, 0)

    def _losses(self, weight: Tensor, bias: Tensor | None, batch: Any) -> Evaluated:
        inputs, targets = split_batch(batch)
        hidden = self.head.body(inputs).to(self.dtype).flatten(0, -2)  # [R, d]
        wanted = targets.flatten().long()
        out = torch.empty(*weight.shape[:-2], len(wanted), device=hidden.device, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):  # the op's precision is its own
            head_loss(hidden, weight, wanted, out, bias=bias, backend=self.backend, precision=self.products)
        if not self.tokens:
            return out, None
        return out.view(*weight.shape[:-2], *targets.shape), targets != IGNORED

    def takes(self, sampled: Sequence[nn.Parameter]) -> bool:
        """Whether draws differ in the head only, so that hidden states serve all of them."""
        own = {id(p) for p in self.head.linear.parameters()}
        return self.head.alone and all(id(p) in own for p in sampled)

    def heads_of(self, stack: Tensor, sampled: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor | None]:
        """(weights [k, C, d], biases [k, C] or None) of k draws [k, P], each laid out as `Task.flat`."""
        linear, k, start = self.head.linear, len(stack), 0
        found: dict[int, Tensor] = {}
        for parameter in sampled:
            found[id(parameter)] = stack[:, start : start + parameter.numel()].view(k, *parameter.shape)
            start += parameter.numel()
        weight = found.get(id(linear.weight), linear.weight.detach().expand(k, -1, -1))
        if linear.bias is None:
            return weight, None
        return weight, found.get(id(linear.bias), linear.bias.detach().expand(k, -1))


def heads_at_a_time(most: int, num_weights: int, device: torch.device) -> int:
    """Draws of a head whose weights are kept until they are evaluated together, at most `most`."""
    room = STACK_BYTES.get(device.type, STACK_BYTES["cpu"])
    return max(1, min(most, room // (4 * num_weights)))


# Unit roundoff of the factors of a product, and of a logit where the unfused pass rounds it to its precision.
FACTOR = {None: 2.0**-21, "tf32": 2.0**-11, "bf16": 0.0, "fp16": 0.0}
LOGIT = {None: 0.0, "tf32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11}


def agreement(hidden: Tensor, linear: nn.Linear, losses: Tensor, precision: str | None) -> Tensor:
    """[R] float64: how far a fused and an unfused loss can be apart, given the unfused ones.

    A logit is off, in either, by d + 2 float32 roundings of the sum of its terms' sizes, two roundings of each factor,
    and of the result where that is rounded. If no logit is off by more than e, a loss L = log(1 + q) has q off by a
    factor exp(2 e) at most, hence L by min(L, 1) (exp(2 e) - 1); and by 1e-6 L from the sum of exponentials.
    """
    wide, weight = hidden.detach().double().abs().flatten(0, -2), linear.weight.detach().double().abs()
    size = wide @ weight.T
    if linear.bias is not None:
        size = size + linear.bias.detach().double().abs()
    unit = 2 * (linear.in_features + 2) * 2.0**-24 + 4 * FACTOR[precision] + 2 * LOGIT[precision]
    off = size.amax(dim=1) * unit
    losses = losses.detach().double().flatten()
    return losses.clamp(max=1) * torch.expm1(2 * off) + 1e-6 * losses + 2.0**-149
