"""Batch norm folded into the convolution before it: one pass over the activations less, the same function.

With running statistics m, v and affine parameters g, b, a batch norm after a convolution is that convolution with
weight w s and bias (c - m) s + b, s = g / sqrt(v + eps). The weights are multiplied in every pass, because they move:
next to the pass itself that costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from lossk.task.prefix import defaults_of


class FoldedConvolution(nn.Module):
    """A convolution and the frozen batch norm that reads its output; their parameters are shared, not copied."""

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.convolution, self.norm = convolution, norm

    def forward(self, x: Tensor) -> Tensor:
        norm, convolution = self.norm, self.convolution
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
        bias = shift * scale if norm.bias is None else torch.addcmul(norm.bias, shift, scale)
        return convolution._conv_forward(x, convolution.weight * scale.view(-1, 1, 1, 1), bias)


def fold_norms(network: nn.Module, arguments: tuple[int, frozenset[str]] | None = None) -> nn.Module | None:
    """The network in eval mode with its batch norms folded; None where it cannot be traced or has nothing to fold.

    Args:
        arguments: how many positional arguments a call gives its forward, and the names of the keywords; the others
            are traced as their defaults.
    """
    try:
        absent = None if arguments is None else defaults_of(network, *arguments)
        root = fx.GraphModule(network, fx.Tracer().trace(network, absent))
    except Exception:  # whatever tracing a stranger's model raises
        return None
    folded, graph = 0, root.graph
    for node in list(graph.nodes):
        pair = _pair(root, node)
        if pair is None:
            continue
        convolution = node.args[0]
        root.add_submodule(f"folded_{folded}", FoldedConvolution(*pair))
        with graph.inserting_before(node):
            new = graph.call_module(f"folded_{folded}", convolution.args, convolution.kwargs)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        graph.erase_node(convolution)
        folded += 1
    if folded == 0:
        return None
    root.recompile()
    return root.eval()


def _pair(root: nn.Module, node: fx.Node) -> tuple[nn.Conv2d, nn.BatchNorm2d] | None:
    """The convolution and the norm, if `node` is a norm that alone reads a convolution's output."""
    if node.op != "call_module" or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if source.op != "call_module" or len(source.users) != 1:
        return None
    norm, convolution = (root.get_submodule(str(each.target)) for each in (node, source))
    if type(norm) is not nn.BatchNorm2d or type(convolution) is not nn.Conv2d or norm.running_mean is None:
        return None
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in (norm, convolution))
    return None if hooked or norm.training else (convolution, norm)
