"""Image towers: padded pictures of many sizes to one vector a picture. Each brings pictures to its own size, so that those kept
in a corpus need not change with the tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ask_ray.models.audio_towers import channels
from ask_ray.models.pooling import Encoded


class ImageTower(nn.Module):
    """A tower. width: the length of its vectors; token_width: of those of single patches, None if it makes none."""

    width: int
    token_width: int | None = None

    def forward(self, pictures: Tensor, sizes: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 pictures and (B, 2) int64 heights and widths in pixels -> (B, width)."""
        return self.encode(pictures, sizes).vectors

    def encode(self, pictures: Tensor, sizes: Tensor) -> Encoded:
        """Arguments as for :meth:`forward`; what is made of a picture depends neither on its batch nor on its padding, and all
        pictures have as many tokens."""
        raise NotImplementedError


@dataclass(frozen=True)
class View:
    """How a tower sees a picture.

    height, width: of what it is given, in pixels; shorter: the picture's shorter side is brought to so many and its middle is
    cut out; None: the whole picture is brought to height and width, whatever its shape; mode: of torch's interpolation;
    mean, std: of the three colours, which are in [0, `scale`].
    """

    height: int
    width: int
    shorter: int | None = None
    mode: str = "bilinear"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def of(self, picture: Tensor) -> Tensor:
        """(3, H, W) uint8 -> (3, height, width) float32, resized with antialiasing and normalised."""
        # Reduced precision would round away shades, so an enclosing autocast does not reach in here.
        with torch.autocast(picture.device.type, enabled=False):
            sides = self._resized(picture.shape[1], picture.shape[2])
            antialias = self.mode in ("bilinear", "bicubic")
            resized = functional.interpolate(picture[None].float(), sides, mode=self.mode, antialias=antialias)[0]
            shades = _middle(resized.clamp(0, 255), self.height, self.width) * (self.scale / 255)
            mean, std = (torch.tensor(of, device=picture.device)[:, None, None] for of in (self.mean, self.std))
            return (shades - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.shorter is None:
            return self.height, self.width
        if height <= width:
            return self.shorter, int(self.shorter * width / height)
        return int(self.shorter * height / width), self.shorter


def _middle(picture: Tensor, height: int, width: int) -> Tensor:
    """The middle of a picture; where it is smaller, black around it. (3, H, W) -> (3, height, width)."""
    top, left = ((have - want) // 2 for have, want in zip(picture.shape[1:], (height, width), strict=True))
    below, right = picture.shape[1] - height - top, picture.shape[2] - width - left
    return functional.pad(picture, (-left, -right, -top, -below))


class Eyes(nn.Module):
    """Pictures as a tower sees them: in training through a random window, but not mirrored, as captions tell left and right."""

    def __init__(self, view: View, crop: float) -> None:
        """`crop`: the least share of each side that a window has in training; 1 switches it off."""
        super().__init__()
        self.view, self.crop = view, crop

    @torch.no_grad()
    def forward(self, pictures: Tensor, sizes: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, each of its own size (B, 2) -> (B, 3, height, width) float32."""
        whole = [picture[:, :height, :width] for picture, (height, width) in zip(pictures, sizes.tolist(), strict=True)]
        return torch.stack([self.view.of(self._window(picture) if self.training else picture) for picture in whole])

    def _window(self, picture: Tensor) -> Tensor:
        for axis in (1, 2):
            side = picture.shape[axis]
            share, place = torch.rand(2).tolist()
            length = max(1, round(side * (self.crop + (1 - self.crop) * share)))
            picture = picture.narrow(axis, int(place * (side - length + 1)), length)
        return picture


class TinyImage(ImageTower):
    """A small convolutional tower with one transformer layer over an 8 × 8 grid, fast enough for a laptop's CPU.

    Norms act on single positions, so a picture's vector does not depend on its batch; the transformer layer knows positions:
    captions tell what is left and what is above.
    """

    SIDE, GRID = 64, 8

    def __init__(self, width: float, dropout: float, crop: float) -> None:
        super().__init__()
        self.eyes = Eyes(View(self.SIDE, self.SIDE), crop)
        self.width = self.token_width = channels(192, width)
        sizes = (3, *(channels(count, width) for count in (32, 64, 128)))
        self.stages = nn.ModuleList(
            [_Stage(before, after, kernel) for before, after, kernel in zip(sizes, sizes[1:], (5, 3, 3), strict=False)]
        )
        self.fold = nn.Linear(sizes[-1], self.width)
        self.place = nn.Parameter(torch.randn(self.GRID**2, self.width) * 0.02)
        self.order = nn.TransformerEncoderLayer(
            self.width, 4, 2 * self.width, dropout, functional.gelu, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(2 * self.width)
        self.pool = nn.Linear(2 * self.width, self.width)

    def encode(self, pictures: Tensor, sizes: Tensor) -> Encoded:
        """See :meth:`ImageTower.encode`."""
        x = self.eyes(pictures, sizes)
        for stage in self.stages:
            x = stage(x)
        x = self.order(self.fold(x.flatten(2).transpose(1, 2)) + self.place)
        vectors = self.pool(self.norm(torch.cat((x.mean(1), x.amax(1)), dim=1)))
        return Encoded(vectors, x, x.new_ones(x.shape[:2], dtype=torch.bool))


class _Stage(nn.Module):
    """A convolution that halves both sides, a norm over channels at each position, and a rectifier."""

    def __init__(self, before: int, after: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, 2, padding=kernel // 2)
        self.norm = nn.LayerNorm(after)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) -> (B, after, H / 2, W / 2)."""
        return functional.relu(self.norm(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
