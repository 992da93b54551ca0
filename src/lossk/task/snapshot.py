"""The user's model and its modes, held so that they can be put back exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import nn

from lossk.task.attributes import Attributes

Switch = Literal["none", "train", "eval"]


@contextmanager
def in_eval_mode(model: nn.Module, switch: Switch) -> Iterator[None]:
    """The model in eval mode; whatever the block does to it, it comes back bit for bit.

    Args:
        switch: "eval" takes it there by its own `eval()`, as its user does; "none" sets the mode of module by module,
            without what a module does of its own when it is switched (merge its weights into another's, say); "train"
            calls `train()` before that, which takes back what an earlier `eval()` did.
    """
    snapshot = _Snapshot(model)
    try:
        if switch != "none":
            snapshot.switch(training=switch == "train")
        for module in model.modules():
            if module.training and switch != "eval":
                module.training = False
        yield
    finally:
        snapshot.restore()


def acting(model: nn.Module) -> list[nn.Module]:
    """The modules that do something of their own when they are switched between training and eval mode."""

    def acts(module: nn.Module) -> bool:
        own = "train" in vars(module) or "eval" in vars(module)
        return own or type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval

    return [module for module in model.modules() if acts(module)]


class _Snapshot:
    """Everything about a model that freezing and running it may touch, held so that it can be put back exactly."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.num_threads = torch.get_num_threads()
        self.parameters = [(p, p.data, p.requires_grad, p.grad) for p in model.parameters()]
        self.modes = [(module, module.training) for module in model.modules()]
        self.attributes = Attributes(model)
        self.switched = False

    def switch(self, *, training: bool) -> None:
        """Call `train()` or `eval()`; what these write into weights in place lands in copies."""
        self.switched = True
        owned = {id(p): p for module in acting(self.model) for p in module.parameters()}
        for parameter in owned.values():
            parameter.data = parameter.data.clone()
        if training:
            self.model.train()
        else:
            self.model.eval()

    def restore(self) -> None:
        """Switch back through `train()` what acts on it; then the very tensors, attributes and flags, in any case."""
        with ExitStack() as last:
            last.callback(self._put_back)
            if self.switched:
                modes = {id(module): training for module, training in self.modes}
                for module in acting(self.model):
                    module.train(modes[id(module)])

    def _put_back(self) -> None:
        for parameter, data, requires_grad, grad in self.parameters:
            parameter.grad = None  # its dtype would have to match while the data changes
            parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        self.attributes.restore()
        for module, training in self.modes:
            if module.training != training:  # the mode of a scripted module is no attribute
                module.training = training
        if torch.get_num_threads() != self.num_threads:
            torch.set_num_threads(self.num_threads)
