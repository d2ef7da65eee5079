"""CED (Dinkel et al. 2024, arXiv 2308.11957): a vision transformer over log-mel patches, for clips of any length."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ask_ray.data.frontend import CED_MEL, LogMel, SpecAugment, valid
from ask_ray.models.audio_towers import AudioTower, normalised
from ask_ray.models.pooling import Encoded, masked_mean

#: Attention heads of the published sizes; each is 64 wide.
HEADS = {"tiny": 3, "mini": 4, "small": 6, "base": 12}
HEAD, DEPTH, PATCH = 64, 12, 16
#: Frames that the published position embeddings were trained for.
CHUNK = 1012


class Ced(AudioTower):
    """A CED, names as in the checkpoints on the hub. Hears 16 kHz.

    Clips longer than `CHUNK` frames (10.12 s) are cut into chunks that are encoded alone; a clip's vector is the mean of
    all its own patches. Frames that do not fill a patch at a chunk's end are left out, as the published model does; unlike
    there, padding is neither attended to nor averaged, and `top_db` is measured from each clip's own peak.
    """

    #: What a published checkpoint holds beside the tower, and the tower's own front end.
    IGNORE = ("outputlayer.", "front_end.", "front.")

    def __init__(self, size: str, width: float, freq_mask: int, time_mask: int) -> None:
        """`size` is a key of `HEADS`; `width` scales the number of heads."""
        super().__init__()
        heads = max(1, round(HEADS[size] * width))
        self.front = LogMel(CED_MEL)
        self.augment = SpecAugment(freq_mask, time_mask)
        self.sample_rate = CED_MEL.sample_rate
        self.width = self.token_width = HEAD * heads
        self.init_bn = nn.BatchNorm2d(CED_MEL.mels, momentum=0.01)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, self.width, PATCH, PATCH)})
        self.time_pos_embed = nn.Parameter(0.02 * torch.randn(1, self.width, 1, CHUNK // PATCH))
        self.freq_pos_embed = nn.Parameter(0.02 * torch.randn(1, self.width, CED_MEL.mels // PATCH, 1))
        self.blocks = nn.ModuleList(_Block(self.width, heads) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Encoded:
        """See :meth:`AudioTower.encode`."""
        least = (PATCH - 1) * CED_MEL.hop
        waveforms = functional.pad(waveforms, (0, max(0, least - waveforms.shape[1])))
        # Clips are silenced at their own length here, because they count as `least` samples long from now on.
        waveforms = waveforms * valid(lengths, waveforms.shape[1])
        features, frames = self.front(waveforms, lengths.clamp(min=least))
        features = self.augment(normalised(self.init_bn, features, frames))
        chunks, patches = chunked(features, frames)
        x, mask = self._tokens(chunks, patches)
        clips = len(waveforms)
        x, mask = x.view(clips, -1, self.width), mask.view(clips, -1)
        return Encoded(masked_mean(x, mask), x, mask)

    def _tokens(self, chunks: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, mels) chunks and the columns of patches (N,) in each -> tokens (N, L, width) and which are true (N, L).

        Chunks without a column are padding, and are not computed.
        """
        heard = patches > 0
        x = self.patch_embed["proj"](chunks[heard][:, None].transpose(2, 3))
        x = x + self.time_pos_embed[..., : x.shape[3]] + self.freq_pos_embed
        rows, columns = x.shape[2:]
        x = x.permute(0, 3, 2, 1).flatten(1, 2)
        mask = valid(patches * rows, rows * columns)
        # A mask costs the fast attention kernels, so batches of whole chunks go without.
        attended = None if mask[heard].all() else mask[heard][:, None, None]
        for block in self.blocks:
            x = block(x, attended)
        x = self.norm(x)
        tokens = x.new_zeros(len(chunks), *x.shape[1:])
        tokens[heard] = x
        return tokens, mask


def chunked(features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Clips cut into chunks of at most `CHUNK` frames, side by side.

    Args:
        features: (B, T, M), of clips with `frames` (B,) each; T is cut or filled up to a multiple of a chunk.

    Returns:
        (B n, T', M) chunks, n for each clip, and (B n,) int64 whole patches in time that belong to the clip in each.
    """
    count = -(-features.shape[1] // CHUNK)
    size = CHUNK if count > 1 else features.shape[1]
    chunks = functional.pad(features, (0, 0, 0, count * size - features.shape[1])).unflatten(1, (count, size))
    left = frames[:, None] - size * torch.arange(count, device=frames.device)
    return chunks.flatten(0, 1), left.clamp(0, size).flatten() // PATCH


class _Block(nn.Module):
    """A transformer block that norms before attention and before its two linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


class _Attention(nn.Module):
    """Self-attention with queries, keys and values made by one linear layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(N, L, width), attending where `mask` (N, 1, 1, L) is true."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


def published_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by this tower's names: those on the hub stand under `encoder.`, the authors' own files number `init_bn`."""
    return {name.removeprefix("encoder.").replace("init_bn.1.", "init_bn."): tensor for name, tensor in tensors.items()}
