"""Networks that turn patches of histology images into features."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scllm._log import quiet_imports

__all__ = ["ENCODERS", "PatchEncoder", "SmallCNN", "image_encoder", "stain_augmented"]

# name -> published weights on the Hugging Face Hub
ENCODERS = {
    "cnn_small": None,
    "resnet18": "microsoft/resnet-18",
    "vit_tiny": "WinKawaks/vit-tiny-patch16-224",
    "dinov2": "facebook/dinov2-small",
}
# mean and standard deviation of the images on which published encoders were trained (ImageNet)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_VIT_TINY: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "intermediate_size": 768,
}
_RESNET18: dict[str, Any] = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
_DINOV2: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}


class SmallCNN(nn.Module):
    """A residual convolutional network of about one million weights, for training on few images."""

    def __init__(self, d_features: int = 256, width: int = 32) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 5 * width]
        self.stem = nn.Conv2d(3, width, 5, stride=2, padding=2)
        self.stages = nn.ModuleList(_Stage(a, b) for a, b in zip([width, *widths[:-1]], widths, strict=True))
        self.out = nn.Linear(widths[-1], d_features)

    def forward(self, patches: Tensor) -> Tensor:
        """``(b, 3, p, p)`` to ``(b, d)``."""
        x = self.stem(patches)
        for stage in self.stages:
            x = stage(x)
        return self.out(x.mean((2, 3)))


class _Stage(nn.Module):
    """Two convolutions and a shortcut, at half the resolution."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(d_in, d_out, 3, stride=2, padding=1)
        self.second = nn.Conv2d(d_out, d_out, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, d_out), nn.GroupNorm(8, d_out)])
        self.shortcut = nn.Conv2d(d_in, d_out, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.norms[0](self.first(x)))
        return F.gelu(self.norms[1](self.second(inner)) + self.shortcut(x))


class PatchEncoder(nn.Module):
    """A network of transformers or our own, from bytes to features.

    Parameters
    ----------
    network
        The network.
    pixels
        Edge to which patches are resized; ``None``: as they are.
    """

    def __init__(self, network: nn.Module, pixels: int | None = None) -> None:
        super().__init__()
        self.network, self.pixels = network, pixels

    def forward(self, patches: Tensor) -> Tensor:
        """``(b, p, p, 3)`` uint8 to ``(b, d)``."""
        x = normalised(patches)
        if self.pixels is not None and x.shape[-1] != self.pixels:
            x = F.interpolate(x, size=self.pixels, mode="bilinear", antialias=True, align_corners=False)
        if isinstance(self.network, SmallCNN):
            return self.network(x)
        found: Any = self.network(pixel_values=x)
        pooled = getattr(found, "pooler_output", None)
        return found.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


def normalised(patches: Tensor) -> Tensor:
    """Scale bytes ``(b, p, p, 3)`` to mean 0 and standard deviation 1 of natural images, ``(b, 3, p, p)``."""
    x = patches.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (_MEAN, _STD))
    return (x - mean) / std


def stain_augmented(patches: Tensor, draws: torch.Generator, strength: float = 0.2) -> Tensor:
    """Turn, mirror and restain patches at random, ``(b, p, p, 3)`` uint8 to the same.

    Stains absorb light, so they are scaled and shifted in optical density, per channel (as HED jitter, Tellez et al.,
    *Med. Image Anal.* 2019, but without separating the stains, so that it works for any stain).
    """
    n = len(patches)
    density = -torch.log((patches.float() + 1) / 256)
    scale = 1 + strength * (2 * torch.rand(n, 1, 1, 3, generator=draws) - 1)
    shift = 0.25 * strength * (2 * torch.rand(n, 1, 1, 3, generator=draws) - 1)
    stained = (256 * torch.exp(-(density * scale + shift)) - 1).clamp(0, 255)
    turns = torch.randint(8, (n,), generator=draws)
    turned = [torch.rot90(patch.flip(0) if turn >= 4 else patch, int(turn) % 4) for patch, turn in zip(stained, turns)]
    return torch.stack(turned).to(torch.uint8) if turned else patches


def image_encoder(name: str | PathLike[str], *, pretrained: bool, random_state: int = 0) -> PatchEncoder:
    """Make an encoder by its name, or load one of transformers from a folder; in evaluation mode and frozen."""
    if isinstance(name, str) and name in ENCODERS:
        encoder = _published(name) if pretrained else _random(name, random_state)
    elif Path(name).is_dir():
        encoder = PatchEncoder(*_loaded(str(name)))
    else:
        raise ValueError(
            f"Expected encoder to be one of {list(ENCODERS)}, a folder with a model of transformers, or a function, "
            f"got {str(name)!r}. Pass one of them."
        )
    return encoder.requires_grad_(False).eval()


def _random(name: str, random_state: int) -> PatchEncoder:
    with quiet_imports():
        from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel, ViTConfig, ViTModel

    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(random_state)
        match name:
            case "cnn_small":
                return PatchEncoder(SmallCNN())
            case "resnet18":
                return PatchEncoder(ResNetModel(ResNetConfig(**_RESNET18)))
            case "vit_tiny":
                return PatchEncoder(ViTModel(ViTConfig(**_VIT_TINY)), 224)
        return PatchEncoder(Dinov2Model(Dinov2Config(**_DINOV2)), 224)


def _published(name: str) -> PatchEncoder:
    address = ENCODERS[name]
    if address is None:
        raise ValueError(
            f"Expected published weights of {name!r}, but there are none. Pass pretrained=False for random weights, or "
            "train it from pixels with tl.fit_spatial(use_rep=None)."
        )
    try:
        return PatchEncoder(*_loaded(address))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"Could not fetch the weights of {name!r} ({address}) from the Hugging Face Hub "
            f"({str(error).splitlines()[0]}). Pass a folder with them as encoder=, or pretrained=False for random "
            "weights."
        ) from error


def _loaded(source: str) -> tuple[nn.Module, int | None]:
    """Load a network of transformers, without executing code of the checkpoint, and the edge of its patches."""
    with quiet_imports():
        from transformers import AutoModel

        network = AutoModel.from_pretrained(source, trust_remote_code=False, use_safetensors=True)
    size = getattr(network.config, "image_size", None)
    return network, size if isinstance(size, int) else None
