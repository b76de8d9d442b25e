"""Images of any source as the bytes of an image file, which are small, and compared and decoded in one way."""

import io
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fedlora.printable import quoted

_MODES = {
    "1": "L",
    "L": "L",
    "LA": "L",
    "P": "RGB",
    "PA": "RGB",
    "RGB": "RGB",
    "RGBA": "RGB",
    "CMYK": "RGB",
    "YCbCr": "RGB",
}
"""Modes with 8 bits per channel or fewer, and what they are converted to."""


def image_reader(folder: Path | None) -> Callable[[Any], bytes]:
    """The function that validates a cell with an image and returns the bytes of an image file.

    A cell is a path, relative to `folder` (None: only absolute paths), the bytes of an image file, a mapping with either,
    as data sets on the hub store images, a PIL image, or pixels: uint8 [height, width] or [height, width, channels].
    Pixels become an uncompressed file (Netpbm), which is the same with every version of every library. The function raises
    a ValueError whose message completes "row 3 ...", with the name of an unreadable file, but no pixels.
    """

    def read(value: Any) -> bytes:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if value is None or isinstance(value, float) or (isinstance(value, str) and not value.strip()):
            raise ValueError("has no image")
        if isinstance(value, str | os.PathLike):
            return _file(str(value), folder)
        if isinstance(value, bytes):
            _checked(value, "has an image that")
            return value
        if isinstance(value, Image.Image):
            return _of_pixels(np.asarray(_plain(ImageOps.exif_transpose(value), "has an image that")))
        if isinstance(value, np.ndarray):
            return _of_pixels(value)
        raise ValueError(f"is of type {type(value).__name__}, not an image, its bytes or its path")

    return read


def decoded(content: bytes) -> Image.Image:
    """The image in a file, upright, in mode "L" (grey) or "RGB". Transparency is ignored.

    Raises:
        ValueError: it cannot be decoded, or has more than 8 bits per channel; the message completes "an image that ...".
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content))
            image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"has more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except Exception as error:  # each format's decoder has its own
        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f"is not readable: {reason}; check that the file is complete") from None
    return _plain(ImageOps.exif_transpose(image))


def _plain(image: Image.Image, prefix: str = "") -> Image.Image:
    """The image in mode "L" or "RGB"."""
    if (mode := _MODES.get(image.mode)) is None:
        message = f"has mode {image.mode!r}; convert it to 8 bits per channel, grey or RGB"
        raise ValueError(f"{prefix} {message}".strip())
    if image.mode in ("P", "PA"):  # Pillow warns of transparent palettes that are not converted to RGBA
        image = image.convert("RGBA")
    return image.convert(mode)


def _file(name: str, folder: Path | None) -> bytes:
    if folder is None and not Path(name).is_absolute():
        raise ValueError("has a relative path, but the table is not a file; give absolute paths or the images themselves")
    try:
        content = ((folder or Path()) / name).read_bytes()
    except OSError as error:
        raise ValueError(f"names the image {quoted(name)}, which cannot be read: {error.strerror}") from None
    _checked(content, f"names the image {quoted(name)}, which")
    return content


def _checked(content: bytes, prefix: str) -> None:
    try:
        decoded(content)
    except ValueError as error:
        raise ValueError(f"{prefix} {error}") from None


def _of_pixels(pixels: np.ndarray) -> bytes:
    """A Netpbm file of the pixels, grey (P5) or RGB (P6)."""
    grey = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 1)
    if pixels.dtype != np.uint8 or not (grey or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))) or not pixels.size:
        raise ValueError(
            f"has pixels of type {pixels.dtype} and shape {list(pixels.shape)}; expected uint8 [height, width] or "
            "[height, width, channels] with 1, 3 or 4 channels"
        )
    height, width = pixels.shape[:2]
    content = pixels if grey else pixels[:, :, :3]
    return b"P%d\n%d %d\n255\n" % (5 if grey else 6, width, height) + content.tobytes()
