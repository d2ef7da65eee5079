"""Every kind of picture becomes upright 8-bit red, green and blue of bounded size; what cannot be decoded says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ask_ray.data.pictures import bounded, load
from ask_ray.data.schema import UnusableClip, usable_pixels

ORIENTATION = 0x0112


def halves(left: tuple[int, int, int] = (200, 40, 30), right: tuple[int, int, int] = (20, 60, 210)) -> Image.Image:
    """40 × 20 pixels, one colour left, another right."""
    image = Image.new("RGB", (40, 20), left)
    image.paste(right, (20, 0, 40, 20))
    return image


def ends(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colours far left and far right."""
    return pixels[10, 3].astype(int), pixels[10, -4].astype(int)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_every_format_keeps_its_colours(ending: str, tmp_path: Path) -> None:
    halves().save(tmp_path / f"ä.{ending}")
    pixels, shrunk = load(tmp_path / f"ä.{ending}", 64)
    assert (pixels.shape, pixels.dtype, shrunk) == ((20, 40, 3), np.uint8, False)
    for found, wanted in zip(ends(pixels), ((200, 40, 30), (20, 60, 210)), strict=True):
        assert np.abs(found - wanted).max() <= 12


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "PA", "1", "CMYK", "YCbCr", "I;16", "I"])
def test_every_mode_becomes_red_green_and_blue(mode: str, tmp_path: Path) -> None:
    left, right = (255, 255, 255), (0, 0, 0)
    if mode in ("I;16", "I"):
        wide = np.repeat(np.repeat([[65535, 0]], 20, axis=1), 20, axis=0)
        image = Image.fromarray(wide.astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        image = halves(left, right).convert("RGBA" if mode == "PA" else mode)
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr", "PA", "I") else "a.png")
    image.save(path)
    found = ends(load(path, 64).pixels)
    assert [colour.tolist() for colour in found] == [list(left), list(right)]


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (16, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load(tmp_path / "a.png", 256).pixels[0, :, 0], np.arange(256))


def test_jpegs_of_four_inks_have_their_colours(tmp_path: Path) -> None:
    halves().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    for found, wanted in zip(ends(load(tmp_path / "a.jpg", 64).pixels), ((200, 40, 30), (20, 60, 210)), strict=True):
        assert np.abs(found - wanted).max() <= 12


def test_white_shows_through_transparent_pixels(tmp_path: Path) -> None:
    image = halves().convert("RGBA")
    image.putpixel((3, 10), (0, 0, 0, 0))
    image.save(tmp_path / "a.png")
    assert ends(load(tmp_path / "a.png", 64).pixels)[0].tolist() == [255, 255, 255]
    palette = halves().quantize(4)
    palette.save(tmp_path / "b.png", transparency=palette.getpixel((3, 10)))
    assert ends(load(tmp_path / "b.png", 64).pixels)[0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("orientation", "upright"), [(1, (20, 40)), (3, (20, 40)), (6, (40, 20)), (8, (40, 20))])
def test_pictures_are_turned_as_their_exif_tells(orientation: int, upright: tuple[int, int], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    halves().save(tmp_path / "a.png", exif=exif)
    pixels = load(tmp_path / "a.png", 64).pixels
    assert pixels.shape[:2] == upright
    red = {1: pixels[10, 3], 3: pixels[10, -4], 6: pixels[3, 10], 8: pixels[-4, 10]}[orientation]
    assert red.tolist() == [200, 40, 30]


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), size=st.integers(16, 1024))
def test_sides_are_bounded_alike_and_never_enlarged(width: int, height: int, size: int) -> None:
    made = bounded((width, height), size)
    assert 1 <= min(made) <= size
    assert max(made) <= 2 * size
    assert made[0] <= width
    assert made[1] <= height
    if min(width, height) <= size and max(width, height) <= 2 * size:
        assert made == (width, height)
    scale = min(1, size / min(width, height), 2 * size / max(width, height))
    assert abs(made[0] - width * scale) <= 1
    assert abs(made[1] - height * scale) <= 1


def test_larger_pictures_are_shrunk_the_same_way_every_time(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    one, two = load(tmp_path / "a.png", 60), load(tmp_path / "a.png", 60)
    assert one.shrunk
    assert one.pixels.shape == (60, 80, 3)
    np.testing.assert_array_equal(one.pixels, two.pixels)
    assert one.pixels.std() < noise.std() / 3, "many pixels are averaged into one"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "missing file"),
        (b"", "empty"),
        (b"this is no picture", "unreadable"),
        ("cut", "unreadable"),
        ("float", "unreadable"),
    ],
)
def test_what_cannot_be_decoded_says_why(content: object, reason: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.tiff" if content == "float" else "a.jpg")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:4000])
    elif content == "float":
        Image.fromarray(np.zeros((20, 20), np.float32)).save(path)
    with pytest.raises(UnusableClip) as refusal:
        load(path, 64)
    assert refusal.value.reason == reason
    assert path.name in str(refusal.value)


def test_pictures_that_are_bombs_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnusableClip, match="decompression bomb"):
        load(tmp_path / "a.png", 64)


def test_pictures_with_too_short_a_side_are_set_aside() -> None:
    assert usable_pixels(np.zeros((8, 9, 3), np.uint8)).shape == (8, 9, 3)
    with pytest.raises(UnusableClip, match="9 × 7 pixels") as refusal:
        usable_pixels(np.zeros((7, 9, 3), np.uint8))
    assert refusal.value.reason == "too small"
