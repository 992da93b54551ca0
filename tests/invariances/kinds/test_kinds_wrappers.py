"""What is put around models: adapters, training frameworks, compilers, parallel wrappers, tracing, checkpointing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from kinds import Kind, check

N, CLASSES = 12, 3


def vectors() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 6), torch.arange(N) % CLASSES


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 2, 6, 5), torch.arange(N) % CLASSES


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, CLASSES))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    )


class Adapted(nn.Module):
    """A linear layer as peft wraps it: the frozen base, and adapters by name that can be merged into it."""

    def __init__(self, base: nn.Linear, rank: int = 2, scaling: float = 2.0) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A, self.lora_B, self.lora_dropout = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.active_adapters, self.merged_adapters = ["default"], []
        for name in ("default", "other"):
            self.lora_A[name] = nn.Linear(base.in_features, rank, bias=False)
            self.lora_B[name] = nn.Linear(rank, base.out_features, bias=False)
            self.lora_dropout[name] = nn.Dropout(0.1)
            self.scaling[name] = scaling
        self.lora_A["other"].requires_grad_(False)
        self.lora_B["other"].requires_grad_(False)

    @torch.no_grad()
    def merge(self) -> None:
        for name in self.active_adapters:
            delta = self.lora_B[name].weight @ self.lora_A[name].weight  # type: ignore[operator]
            self.base_layer.weight += self.scaling[name] * delta
            self.merged_adapters.append(name)

    def forward(self, x: Tensor) -> Tensor:
        found = self.base_layer(x)
        if self.merged_adapters:
            return found
        for name in self.active_adapters:
            inner = self.lora_A[name](self.lora_dropout[name](x))
            found = found + self.scaling[name] * self.lora_B[name](inner)
        return found


def adapted() -> nn.Module:
    head = nn.Linear(8, CLASSES).requires_grad_(False)
    return nn.Sequential(Adapted(nn.Linear(6, 8)), nn.Tanh(), head)


def adapted_and_merged() -> nn.Module:
    """Merged by the user's own hand, with the head to be sampled."""
    model = nn.Sequential(Adapted(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, CLASSES))
    model[0].merge()
    for adapter in (model[0].lora_A, model[0].lora_B):
        adapter.requires_grad_(False)
    return model


ADAPTERS = {
    "lora": Kind(adapted, vectors),
    "lora-merged-by-the-user": Kind(adapted_and_merged, vectors),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(kind: str) -> None:
    check(ADAPTERS[kind])


class Hparams(dict[str, Any]):
    """A dictionary with attributes, as Lightning keeps a module's settings."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class MeanMetric(nn.Module):
    """A metric whose states are plain attributes, as torchmetrics keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self._defaults = {"total": torch.zeros(()), "count": torch.zeros(())}
        self.total, self.count = torch.tensor(3.0), torch.tensor(2.0)
        self._computed: Tensor | None = None


class Lit(nn.Module):
    """A Lightning module: a trainer that knows the module, settings, metrics, steps, an overridden `train`."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.metric = network(), MeanMetric()
        self.hparams = Hparams(lr=0.1, width=8)
        self.example_input_array = torch.zeros(1, 6)
        self.logged: dict[str, float] = {}
        self.switches: list[bool] = []
        self.automatic_optimization = True
        self.trainer = SimpleNamespace(module=self, current_epoch=4, callback_metrics={"loss": torch.tensor(0.5)})

    def log(self, name: str, value: float) -> None:
        self.logged[name] = value

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", float(loss.detach()))
        return loss

    def losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")


def lit_losses(model: nn.Module, batch: Any) -> Tensor:
    return model.losses(batch)  # type: ignore[operator]


FRAMEWORKS = {
    "lightning-module": Kind(Lit, vectors),
    "lightning-module-with-its-own-losses": Kind(Lit, vectors, lit_losses, lit_losses),
}


@pytest.mark.parametrize("kind", FRAMEWORKS)
def test_frameworks(kind: str) -> None:
    check(FRAMEWORKS[kind])


class Doubled(nn.Module):
    """Compiled inside another model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), backend="eager")
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def compiled_in_place() -> nn.Module:
    model = network()
    model.compile(backend="eager")
    return model


COMPILED = {
    "torch-compile": Kind(lambda: torch.compile(network(), backend="eager"), vectors),  # type: ignore[arg-type,return-value]
    "torch-compile-ahead-of-time-autograd": Kind(
        lambda: torch.compile(network(), backend="aot_eager"),  # type: ignore[arg-type,return-value]
        vectors,
    ),
    "compiled-in-place": Kind(compiled_in_place, vectors),
    "compiled-part": Kind(Doubled, vectors),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled(kind: str) -> None:
    torch.compiler.reset()
    check(COMPILED[kind])


PARALLEL = {
    "data-parallel": Kind(lambda: nn.DataParallel(network()), vectors),
    "data-parallel-batch-norm": Kind(lambda: nn.DataParallel(convolutional()), images),
}


@pytest.mark.parametrize("kind", PARALLEL)
def test_data_parallel(kind: str) -> None:
    check(PARALLEL[kind])


class Branched(nn.Module):
    """Does something else in training: a trace keeps what it saw in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(6, 8), nn.Linear(8, CLASSES), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.training:
            x = self.drop(x)
        return self.second(x)


GRAPHS = {
    "traced": Kind(lambda: torch.jit.trace(Branched().eval(), torch.randn(2, 6)), vectors),
    "graph-module": Kind(lambda: fx.symbolic_trace(convolutional()), images),
}


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_graphs(kind: str) -> None:
    check(GRAPHS[kind])


class Checkpointed(nn.Module):
    """Its first part is run again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2)), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Halved:
    """A forward hook that changes what a module gives."""

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output / 2


def hooked() -> nn.Module:
    model = network()
    model[0].register_forward_hook(Halved())
    model[3].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.1,))
    model[3].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 1.0,))
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: None)
    return model


def clipped() -> nn.Module:
    """A hook on a parameter's gradient, which the user's own training sees."""
    model = network()
    model[0].weight.register_hook(lambda gradient: gradient.clamp(-1e3, 1e3))
    return model


AROUND = {
    "checkpointing": Kind(Checkpointed, vectors),
    "forward-and-backward-hooks": Kind(hooked, vectors),
    "gradient-hook": Kind(clipped, vectors),
}


@pytest.mark.parametrize("kind", AROUND)
def test_around(kind: str) -> None:
    check(AROUND[kind])
