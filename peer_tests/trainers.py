"""A small classifier under Lightning's and Hugging Face's trainers: what their tests and the page's examples share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

DATA = (torch.randn(40, 3, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 2)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class Module(lightning.LightningModule):
    """For Lightning's trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)


class Model(nn.Module):
    """For Hugging Face's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.net(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset):
    """DATA, as Hugging Face's trainer takes it."""

    def __len__(self) -> int:
        return len(DATA[0])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": DATA[0][i], "labels": DATA[1][i]}


def lightning_settings(path: Path) -> dict[str, Any]:
    """A quiet trainer of three epochs."""
    return {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": path,
    }


def huggingface_arguments(path: Path) -> transformers.TrainingArguments:
    """Four steps, a checkpoint after every second."""
    return transformers.TrainingArguments(
        output_dir=str(path),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=10,
        report_to=[],
        use_cpu=True,
        learning_rate=0.1,
        disable_tqdm=True,
    )
