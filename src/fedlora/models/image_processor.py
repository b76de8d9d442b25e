"""A model's image processor, in two steps: to uint8 pixels of one size, which are kept, and to the model's input."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from transformers.utils import cached_file

from fedlora.errors import UserError
from fedlora.models.loading import user_errors

_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class ImageEncoder:
    """An image processor of transformers. `scale` and `shift` are its rescaling and normalization as one affine map."""

    processor: Any
    mode: str
    """Pillow's mode of the model's images: "RGB", or "L" for a model of one channel."""
    scale: Float[Tensor, "channels 1 1"]
    shift: Float[Tensor, "channels 1 1"]
    notes: tuple[str, ...] = ()
    """Notes for the user."""

    def pixels(self, images: Iterable[Image.Image], count: int) -> UInt8[Tensor, "count channels height width"]:
        """The images, `count` of them and at least one, in the model's mode and size; they are read one after the other."""
        found = (_resized(self.processor, image.convert(self.mode)) for image in images)
        first = next(found)
        pixels = np.empty((count, *first.shape), np.uint8)
        for place, one in zip(pixels, chain([first], found), strict=True):
            place[...] = one
        return torch.from_numpy(pixels)

    def normalized(
        self, pixels: UInt8[Tensor, "*images channels height width"]
    ) -> Float[Tensor, "*images channels height width"]:
        """The model's input in fp32."""
        return pixels.float() * self.scale.to(pixels.device) + self.shift.to(pixels.device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the processor's configuration."""
        self.processor.save_pretrained(folder)


def load_image_processor(source: str, path: str, model: Any) -> ImageEncoder:
    """The image processor of the model's checkpoint; if it has none, one that resizes to the model's size and maps the
    values to -1..1.

    Raises:
        UserError: it cannot be loaded, gives images of several sizes or of other channels than the model's, or does more
            than resize, crop, rescale and normalize.
    """
    config = getattr(model.config, "vision_config", model.config)
    channels, notes = int(getattr(config, "num_channels", 3)), []
    with user_errors(source):
        if any(cached_file(path, name, _raise_exceptions_for_missing_entries=False) for name in _FILES):
            # the same pixels whether torchvision is installed or not; use_fast: for transformers 4
            processor = transformers.AutoImageProcessor.from_pretrained(
                path, backend="pil", use_fast=False, trust_remote_code=False
            )
        else:
            processor = _plain_processor(config, channels)
            size = processor.size["height"], processor.size["width"]
            notes = [
                f"model = {source!r} has no preprocessor_config.json: images are resized to {size[0]} x {size[1]}, and "
                "their values are mapped to -1..1"
            ]
    encoder = _encoder(processor, "L" if channels == 1 else "RGB", tuple(notes))
    if encoder is None or len(encoder.scale) != channels:
        raise UserError(
            f"model = {source!r}: {type(processor).__name__} does not turn every image into one of {channels} "
            "channels and of one size by resizing, cropping, rescaling and normalizing; set do_resize, size, image_mean "
            "and image_std in preprocessor_config.json"
        )
    return encoder


def check_independent(source: str, model: nn.Module) -> None:
    """Rejects batch normalization, through which the images of a batch influence each other.

    Raises:
        UserError: the model has it.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise UserError(
            f"model = {source!r}: models of type {kind!r} have batch normalization, by which the images of a batch "
            "influence each other, and are not supported; choose a vision transformer, or ConvNeXt"
        )


def without_drop_path(source: str, model: nn.Module) -> list[str]:
    """Switches off stochastic depth, whose random numbers do not belong to any client; returns a note if there was any."""
    found: list[Any] = [module for module in model.modules() if getattr(module, "drop_prob", None)]
    for module in found:
        module.drop_prob = 0.0
    return [f"model = {source!r}: stochastic depth (drop_path_rate) is not supported and is switched off"] if found else []


def _plain_processor(config: Any, channels: int) -> Any:
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    make = getattr(
        transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor
    )  # transformers 4 has only the latter
    half = [0.5] * channels
    return make(size={"height": height, "width": width}, image_mean=half, image_std=half)


def _encoder(processor: Any, mode: str, notes: tuple[str, ...]) -> ImageEncoder | None:
    """The processor in two steps; None if these do not give the processor's own result for images of two sizes."""
    random = np.random.default_rng(0)
    try:
        tried = [
            Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8), "RGB").convert(mode)
            for height, width in ((40, 30), (33, 64))
        ]
        shift, largest = (_processed(processor, Image.new("L", (32, 32), value).convert(mode)) for value in (0, 255))
        shift, largest = (x[:, x.shape[1] // 2, x.shape[2] // 2, None, None] for x in (shift, largest))
        encoder = ImageEncoder(processor, mode, (largest - shift) / 255, shift, notes)
        found, expected = (
            encoder.normalized(encoder.pixels(tried, len(tried))),
            torch.stack([_processed(processor, x) for x in tried]),
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    except Exception:  # any error of a processor that does not fit
        return None
    return encoder


def _processed(processor: Any, image: Image.Image) -> Float[Tensor, "channels height width"]:
    return torch.from_numpy(np.asarray(processor(images=[image], return_tensors="np")["pixel_values"][0], np.float32))


def _resized(processor: Any, image: Image.Image) -> np.ndarray:
    """The image [channels, height, width] before rescaling and normalization."""
    found = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    return np.asarray(found).astype(np.uint8, casting="safe")
