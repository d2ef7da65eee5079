"""Decoding: any file that Pillow reads, upright, as 8-bit red, green and blue of bounded size."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ask_ray.data.files import present
from ask_ray.data.schema import UnusableClip

#: A picture's longer side may be so many times `data.image_size`.
LONGEST = 2

#: What shows through transparent pixels.
GROUND = (255, 255, 255, 255)


class Decoded(NamedTuple):
    """pixels: (height, width, 3) uint8; shrunk: whether the file holds more of them."""

    pixels: np.ndarray
    shrunk: bool


def load(path: Path, size: int) -> Decoded:
    """Decode a picture (jpg, png, webp, …; of an animation the first), turn it as its EXIF tells, and shrink it so that its
    shorter side has at most `size` pixels and its longer at most twice as many.

    Raises:
        UnusableClip: if the file is missing, empty, or cannot be decoded.
    """
    present(path)
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            full = _rgb(upright)
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise UnusableClip("unreadable", f"{path}: {error or type(error).__name__}") from error
    made = full.resize(bounded(full.size, size), Image.Resampling.BICUBIC)
    return Decoded(np.array(made), made.size != full.size)


def bounded(sides: tuple[int, int], size: int) -> tuple[int, int]:
    """The sides of a picture, in pixels, brought down to `size` the shorter and twice `size` the longer, alike."""
    scale = min(1.0, size / min(sides), LONGEST * size / max(sides))
    return max(1, round(sides[0] * scale)), max(1, round(sides[1] * scale))


def _rgb(image: Image.Image) -> Image.Image:
    """Palettes looked up, transparency laid on white, 16 bits a pixel brought down to 8.

    Raises:
        ValueError: if the pixels have no known range.
    """
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of no known range")
    if image.mode.startswith("I"):  # Pillow's own conversion cuts 16 bits off instead of scaling them
        sixteen = np.asarray(image).astype(np.float64).clip(0, 65535)
        image = Image.fromarray(np.rint(sixteen / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, GROUND), image)
    return image.convert("RGB")
