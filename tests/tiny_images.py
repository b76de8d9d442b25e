"""Vision models so small that training them costs nothing, and images for them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def tiny_vit(folder: Path, channels: int = 1, processor: bool = True) -> Path:
    """Writes a ViT of 28 x 28 pixels in patches of 7 with random weights, and an image processor; the folder."""
    config = transformers.ViTConfig(image_size=28, patch_size=7, num_channels=channels, **SMALL)
    if processor:
        vit_processor(channels).save_pretrained(folder)
    return tiny_vision(folder, config)


def tiny_vision(folder: Path, config: Any) -> Path:
    """Writes a model of this configuration with random weights and without a task head; the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


def vit_processor(channels: int, **more: Any) -> Any:
    """A processor that resizes to 28 x 28 pixels, with a different mean for each channel."""
    make = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.3, 0.4][:channels]
    return make(**{"size": {"height": 28, "width": 28}, "image_mean": mean, "image_std": std, **more})


def tiny_pictures(n: int, size: tuple[int, int] = (28, 28)) -> tuple[np.ndarray, np.ndarray]:
    """Grey pixels [n, height, width], bright in the third that the label tells, and the labels 0, 1 and 2 in turn."""
    rng, labels = np.random.default_rng(n), np.arange(n) % 3
    pixels = rng.integers(0, 90, (n, *size), np.uint8)
    for one, label in zip(pixels, labels, strict=True):
        one[label * size[0] // 3 : (label + 1) * size[0] // 3] += 150
    return pixels, labels


def tiny_npz(path: Path, n: int) -> Path:
    """Writes `tiny_pictures` as the arrays `image` and `label`; the file."""
    pixels, labels = tiny_pictures(n)
    np.savez(path, image=pixels, label=labels)
    return path
