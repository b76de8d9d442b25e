"""Image classification."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import transformers
from jaxtyping import Bool, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from fedlora.data.columns import Column
from fedlora.data.images import decoded
from fedlora.errors import UserError
from fedlora.models.checkpoint import Checkpoint
from fedlora.models.image_processor import ImageEncoder, check_independent, load_image_processor, without_drop_path
from fedlora.models.loading import load_model, outline_model
from fedlora.tasks.classification import Classification
from fedlora.tasks.task import Examples

Pixels = UInt8[Tensor, "rows 1 channels height width"]
_LOAD = """\
import json
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder = Path()  # where this file is
labels = dict(enumerate(json.loads((folder / "labels.json").read_text())))
base = AutoModelForImageClassification.from_pretrained(
    PeftConfig.from_pretrained(folder).base_model_name_or_path,
    num_labels={classes},
    id2label=labels,
    ignore_mismatched_sizes=True{arguments},
)
model = PeftModel.from_pretrained(base, folder)
processor = AutoImageProcessor.from_pretrained(folder)
"""

_LOAD_MERGED = """\
from pathlib import Path

from transformers import AutoImageProcessor, AutoModelForImageClassification

folder = Path()  # where this file is
model = AutoModelForImageClassification.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder)
"""


@dataclass(frozen=True)
class ImageClassification(Classification):
    """Classification of images; statistics and metrics are those of `Classification`.

    Examples are uint8 pixels [channels, height, width] of the model's size, a quarter of its input in fp32; they
    are normalized batch by batch. Each counts as one token, since all have the same length.
    """

    peft_type = None  # PEFT has no type for it
    pipeline_tag = "image-classification"
    merged_code = _LOAD_MERGED

    augment: Literal["none", "flip"] = "none"
    crop_padding: int = 0

    def columns(self, named: Collection[str]) -> list[Column]:
        """The image and the label."""
        return [Column("image", "image"), Column("label", "label", target=True)]

    def made_up(self, texts: Sequence[str], classes: int) -> Mapping[str, Sequence[Any]]:
        """An image of noise for each text, and all labels in turn."""
        rng = torch.Generator().manual_seed(0)
        noise = torch.randint(256, (len(texts), 16 * 16 * 3), dtype=torch.uint8, generator=rng)
        images = [b"P6\n16 16\n255\n" + bytes(one.tolist()) for one in noise]
        return {"image": images, "label": super().made_up(texts, classes)["label"]}

    def load(self, source: str, labels: Sequence[str], seed: int) -> tuple[nn.Module, Any, Checkpoint]:
        """The model with a head for these labels, and its `ImageEncoder`; see `load_model`.

        Raises:
            UserError: also if the model has batch normalization.
        """
        auto = transformers.AutoModelForImageClassification
        model, encoder, checkpoint = load_model(source, auto, self._settings(labels), seed, load_image_processor)
        check_independent(source, model)
        notes = (*checkpoint.notes, *encoder.notes, *without_drop_path(source, model))
        return model, encoder, replace(checkpoint, notes=notes)

    def outline(self, source: str, labels: Sequence[str]) -> tuple[nn.Module, Any]:
        """The same model without its weights."""
        auto = transformers.AutoModelForImageClassification
        model, encoder = outline_model(source, auto, self._settings(labels), load_image_processor)
        check_independent(source, model)
        return model, encoder

    def encode(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> Examples:
        """Pixels of the model's size; `tokenizer` is an `ImageEncoder`, and `max_length` has no meaning."""
        encoder: ImageEncoder = tokenizer
        targets = torch.tensor(list(columns["label"]), dtype=torch.long)
        starts = torch.arange(len(targets) + 1)
        if not len(targets):
            return Examples({}, starts, targets, {})

        pixels = encoder.pixels(map(decoded, columns["image"]), len(targets))
        height, width = pixels.shape[-2:]
        if self.crop_padding >= min(height, width):
            raise UserError(
                f"task.crop_padding = {self.crop_padding}: the model's images have {height} x {width} pixels; set "
                f"task.crop_padding to at most {min(height, width) - 1}"
            )

        def decode(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"pixel_values": encoder.normalized(inputs["pixel_values"].squeeze(1))}

        return Examples(
            {"pixel_values": pixels},
            starts,
            targets,
            {"pixel_values": 0},
            decode=decode,
            augment=self._augmented if self.augment == "flip" or self.crop_padding else None,
        )

    def _augmented(self, inputs: dict[str, Tensor], draws: Int[Tensor, " rows"]) -> dict[str, Tensor]:
        """The images cropped and mirrored at random, given a random number for each; its lowest bit is for mirroring."""
        pixels = inputs["pixel_values"]
        if self.crop_padding:
            pixels = _cropped(pixels, draws // 2, self.crop_padding)
        if self.augment == "flip":
            pixels = _flipped(pixels, draws)
        return {"pixel_values": pixels}

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """As `Classification`."""
        return super().losses(model, _as_model(model, inputs), targets)

    def measure(
        self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor, real: Bool[Tensor, "clients longest"]
    ) -> Mapping[str, Tensor]:
        """As `Classification`."""
        return super().measure(model, _as_model(model, inputs), targets, real)

    def predict(
        self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor, columns: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, Any]]:
        """As `Classification`."""
        return super().predict(model, _as_model(model, inputs), targets, columns)

    def loading_code(self, labels: Sequence[str], pad: int, arguments: str) -> str:
        """Loads the adapter with the head for these labels, and the image processor."""
        return _LOAD.format(classes=len(labels), arguments=arguments)

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The last layer's first token, or of a map of features the mean over its places [rows, width]."""
        whole: Any = model
        found: list[Any] = []
        base = whole.vision_model if whole.base_model is whole else whole.base_model  # the former: CLIP
        hook = base.register_forward_hook(lambda *call: found.append(call[-1]))
        try:
            whole(**_as_model(model, inputs))
        finally:
            hook.remove()
        hidden: Tensor = found[0][0]  # [rows, tokens, width], or [rows, width, height, width of the map]
        return (hidden.mean((2, 3)) if hidden.ndim == 4 else hidden[:, 0]).float()

    def tokens_read(self, inputs: Mapping[str, Tensor], targets: Tensor | None) -> None:
        """All, as an image has no token in its inputs."""


def _flipped(pixels: Pixels, draws: Int[Tensor, " rows"]) -> Pixels:
    """The images with an odd number mirrored, left to right."""
    return torch.where((draws % 2 == 1).view(-1, 1, 1, 1, 1), pixels.flip(-1), pixels)


def _cropped(pixels: Pixels, draws: Int[Tensor, " rows"], padding: int) -> Pixels:
    """The parts of the original size, at places given by the numbers, of the images padded with black on all sides."""
    height, width = pixels.shape[-2:]
    places, row = 2 * padding + 1, torch.arange(len(pixels), device=pixels.device)
    top, left = draws % places, draws // places % places
    y = top[:, None] + torch.arange(height, device=pixels.device)  # [rows, height]
    x = left[:, None] + torch.arange(width, device=pixels.device)  # [rows, width]
    padded = functional.pad(pixels, [padding] * 4)
    return padded[row[:, None, None], :, :, y[:, :, None], x[:, None, :]].movedim((1, 2), (3, 4))


def _as_model(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs in the data type in which the model computes."""
    return {name: x.to(next(model.parameters()).dtype) for name, x in inputs.items()}
