"""Token-wise interaction against a loop over every word and frame, in any chunks, by finite differences, and with padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from ask_ray.method import interaction
from ask_ray.method.interaction import Packed, Tokens

CPU = torch.device("cpu")


def tokens(rows: int, most: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tokens:
    """Rows of one to `most` tokens in random places, with loud noise where they are padded."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, most, generator=rng) < 0.6
    mask[torch.arange(rows), torch.randint(most, (rows,), generator=rng)] = True
    vectors = functional.normalize(torch.randn(rows, most, width, generator=rng, dtype=dtype), dim=2)
    weights = interaction.token_weights(2 * torch.randn(rows, most, generator=rng, dtype=dtype), mask)
    return Tokens(vectors, weights, mask)


def brute_force(audio: Tokens, text: Tokens) -> np.ndarray:
    """L, one clip and one caption at a time, over their true tokens alone."""
    made = np.empty((len(audio.mask), len(text.mask)))
    for i in range(made.shape[0]):
        for j in range(made.shape[1]):
            frames = [(f, float(b)) for f, b, there in zip(*(part[i] for part in audio), strict=True) if there]
            words = [(t, float(a)) for t, a, there in zip(*(part[j] for part in text), strict=True) if there]
            by_words = sum(a * max(float(t @ f) for f, _ in frames) for t, a in words)
            by_frames = sum(b * max(float(f @ t) for t, _ in words) for f, b in frames)
            made[i, j] = (by_words + by_frames) / 2
    return made


SHAPES = (st.integers(1, 5), st.integers(1, 6), st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**16))


@settings(max_examples=60, deadline=None)
@given(*SHAPES, st.integers(1, 400))
def test_every_word_meets_its_best_frame_and_every_frame_its_best_word(clips, frames, captions, words, width, seed, cells):
    audio, text = tokens(clips, frames, width, seed), tokens(captions, words, width, seed + 1)
    made = interaction.token_scores(audio, text, cells)
    np.testing.assert_allclose(made, brute_force(audio, text), atol=1e-12)
    np.testing.assert_allclose(interaction.token_scores(text, audio).T, made, atol=1e-12)
    assert made.abs().max() <= 1 + 1e-12


@settings(max_examples=40, deadline=None)
@given(*SHAPES, st.integers(1, 400))
def test_a_packed_split_scores_as_its_rows_do_in_any_chunks(clips, frames, captions, words, width, seed, cells):
    """Vectors of few binary digits: products are exact, whatever the chunks, and also in 16 bits."""
    audio, text = (
        side._replace(vectors=(16 * side.vectors).trunc() / 16, weights=side.weights.float())
        for side in (tokens(clips, frames, width, seed), tokens(captions, words, width, seed + 1))
    )
    joined = [Packed.joined([Packed.of(side.rows(slice(0, 1))), Packed.of(side.rows(slice(1, None)))]) for side in (audio, text)]
    made = torch.cat([*interaction.score_rows(*joined, CPU, cells)])
    assert made.shape == (clips, captions)
    assert made.dtype == torch.float32
    whole = torch.cat([*interaction.score_rows(*joined, CPU)])
    torch.testing.assert_close(made, whole, atol=1e-6, rtol=0)
    floats = [side._replace(vectors=side.vectors.float()) for side in (audio, text)]
    torch.testing.assert_close(whole, interaction.token_scores(*floats), atol=1e-6, rtol=0)


def test_packing_keeps_every_token_and_no_padding():
    audio = tokens(7, 5, 3, 0, torch.float32)
    packed = Packed.of(audio)
    assert (packed.vectors.dtype, packed.weights.dtype) == (torch.float16, torch.float32)
    assert len(packed.vectors) == len(packed.weights) == int(audio.mask.sum())
    assert torch.equal(packed.lengths, audio.mask.sum(1))
    for start, stop in ((0, 7), (2, 5), (6, 7)):
        some = packed.rows(slice(start, stop), CPU)
        assert some.mask.shape[1] == int(audio.mask[start:stop].sum(1).max())
        assert torch.equal(some.vectors[some.mask], audio.vectors[start:stop][audio.mask[start:stop]].half().float())
        assert torch.equal(some.weights[some.mask], audio.weights[start:stop][audio.mask[start:stop]])
        assert not some.weights[~some.mask].any()


def test_gradients_are_those_of_finite_differences_and_none_reach_padding():
    audio, text = tokens(3, 4, 3, 0), tokens(2, 5, 3, 1)
    rng = torch.Generator().manual_seed(2)
    logits = [torch.randn(side.mask.shape, generator=rng, dtype=torch.float64) for side in (audio, text)]
    leaves = [leaf.requires_grad_() for leaf in (audio.vectors, text.vectors, *logits)]

    def scores(frames: Tensor, words: Tensor, of_frames: Tensor, of_words: Tensor) -> Tensor:
        sides = zip((frames, words), (of_frames, of_words), (audio.mask, text.mask), strict=True)
        weighed = [Tokens(vectors, interaction.token_weights(weights, mask), mask) for vectors, weights, mask in sides]
        return interaction.token_scores(*weighed, cells=30)

    assert torch.autograd.gradcheck(scores, leaves)
    scores(*leaves).square().sum().backward()
    for leaf, mask in zip(leaves, (audio.mask, text.mask, audio.mask, text.mask), strict=True):
        assert not leaf.grad[~mask].any()
        assert leaf.grad[mask].abs().sum() > 0


def test_padding_says_nothing_however_near_it_is():
    audio, text = tokens(2, 4, 3, 0), tokens(2, 4, 3, 1)
    mask = torch.tensor([[True, True, False, False]] * 2)
    weights = interaction.token_weights(torch.zeros(2, 4), mask).double()
    audio, text = (Tokens(side.vectors, weights, mask) for side in (audio, text))
    nearer = audio._replace(vectors=torch.where(mask[..., None], audio.vectors, text.vectors[:, :1]))
    assert torch.equal(interaction.token_scores(nearer, text), interaction.token_scores(audio, text))


def test_half_precision_is_computed_in_float32_whatever_autocast_says():
    audio, text = tokens(3, 4, 8, 0, torch.float32), tokens(3, 4, 8, 1, torch.float32)
    rough = [side._replace(vectors=side.vectors.bfloat16()) for side in (audio, text)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = interaction.token_scores(*rough)
    assert made.dtype == torch.float32
    exact = interaction.token_scores(*(side._replace(vectors=side.vectors.float()) for side in rough))
    torch.testing.assert_close(made, exact)
    assert interaction.token_weights(torch.zeros(1, 2).bfloat16(), torch.ones(1, 2, dtype=torch.bool)).dtype == torch.float32


def test_a_pair_that_is_the_same_scores_one():
    audio = tokens(4, 5, 6, 3)
    torch.testing.assert_close(interaction.token_scores(audio, audio).diagonal(), torch.ones(4, dtype=torch.float64))
    assert torch.equal(interaction.combined(torch.ones(2, 3), torch.zeros(2, 3)), torch.full((2, 3), 0.5))


def test_memory_of_the_forward_pass_does_not_grow_with_the_number_of_pairs():
    """40 clips of 50 frames with 300 captions of 12 words make 7.2 million products, 29 MB at once."""
    audio, text = tokens(40, 50, 8, 0, torch.float32), tokens(300, 12, 8, 1, torch.float32)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        interaction.token_scores(audio, text, cells=1 << 16)
    largest = max(event.self_cpu_memory_usage / event.count for event in profile.key_averages())
    assert largest < 4 * (1 << 17)


def test_rejections():
    with pytest.raises(ValueError, match=r"text\.vectors"):
        interaction.token_scores(tokens(2, 3, 4, 0), tokens(2, 3, 5, 0))
    with pytest.raises(ValueError, match="mask"):
        interaction.token_weights(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="tokenwise"):
        interaction.combined(torch.zeros(2, 3), torch.zeros(3, 2))
