"""The tiny image tower and how towers see pictures: whole and in place, each on its own, in training through a window."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch.nn import functional

from ask_ray.config import ModelSettings
from ask_ray.data.batches import pad
from ask_ray.models import registry
from ask_ray.models.dual_encoder import scores
from ask_ray.models.image_towers import Eyes, TinyImage, View


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(sides=st.lists(st.tuples(st.integers(8, 80), st.integers(8, 80)), min_size=1, max_size=5))
@budget(max_examples=40)
def test_a_pictures_vector_and_tokens_do_not_depend_on_its_batch(sides: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    tower = TinyImage(0.25, 0.1, 0.9).eval()
    pictures = [noise(*side, seed=n) for n, side in enumerate(sides)]
    with torch.inference_mode():
        together = tower(*pad(pictures))
        alone = torch.cat([tower(*pad([one])) for one in pictures])
        made, single = tower.encode(*pad(pictures)), [tower.encode(*pad([one])) for one in pictures]
    assert together.shape == (len(sides), tower.width)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(made.vectors, together)
    assert made.tokens.shape == (*made.mask.shape, tower.token_width) == (len(sides), 64, tower.token_width)
    assert made.mask.all()
    torch.testing.assert_close(made.tokens, torch.cat([one.tokens for one in single]), atol=1e-5, rtol=1e-5)


def test_left_and_right_are_told_apart() -> None:
    torch.manual_seed(0)
    tower = TinyImage(0.5, 0.0, 1.0).eval()
    picture = noise(64, 64)
    with torch.inference_mode():
        here, mirrored = tower(*pad([picture, picture[:, ::-1]]))
    assert functional.cosine_similarity(here, mirrored, dim=0) < 0.9999


def test_a_view_of_a_picture_that_has_its_size_is_the_picture() -> None:
    picture = torch.from_numpy(noise(12, 20)).permute(2, 0, 1)
    seen = View(12, 20, mean=(0.0, 0.5, 0.0), std=(1.0, 1.0, 2.0)).of(picture)
    expected = picture / 255 - torch.tensor([0.0, 0.5, 0.0])[:, None, None]
    torch.testing.assert_close(seen, expected / torch.tensor([1.0, 1.0, 2.0])[:, None, None])


@pytest.mark.parametrize(("height", "width"), [(60, 40), (40, 60)])
def test_the_middle_is_cut_out_after_the_shorter_side_is_brought_to_size(height: int, width: int) -> None:
    picture = torch.zeros(3, height, width, dtype=torch.uint8)
    picture[:, height // 2 - 10 : height // 2 + 10, width // 2 - 10 : width // 2 + 10] = 255
    seen = View(20, 20, shorter=40, mean=(0.0,) * 3, std=(1.0,) * 3).of(picture)
    torch.testing.assert_close(seen, torch.ones(3, 20, 20))
    around = View(44, 44, shorter=40, mean=(0.0,) * 3, std=(1.0,) * 3).of(torch.full_like(picture, 255))
    ours = around if height > width else around.transpose(1, 2)
    assert ours.shape == (3, 44, 44)
    assert not ours[:, :, [0, 1, -1, -2]].any(), "black beside a picture that is too narrow"
    torch.testing.assert_close(ours[:, :, 2:-2], torch.ones(3, 44, 40))


def test_training_sees_windows_of_at_least_the_asked_share_and_evaluation_the_whole() -> None:
    ramp = np.repeat(np.repeat(np.arange(100, dtype=np.uint8)[None, :, None], 50, axis=0), 3, axis=2)
    eyes = Eyes(View(50, 100, mean=(0.0,) * 3, std=(1.0,) * 3), 0.6)
    torch.manual_seed(0)
    spans = []
    for _ in range(50):
        seen = eyes(*pad([ramp]))[0, 0, 0] * 255
        spans.append(float(seen[-1] - seen[0]) + 1)
    assert min(spans) > 58
    assert min(spans) < 70
    assert max(spans) > 90
    whole = eyes.eval()(*pad([ramp]))
    torch.testing.assert_close(whole[0, 0, 0] * 255, torch.arange(100.0))
    same = Eyes(View(50, 100, mean=(0.0,) * 3, std=(1.0,) * 3), 1.0)
    assert torch.equal(same(*pad([ramp])), whole)


def test_half_precision_does_not_reach_the_view() -> None:
    eyes = Eyes(View(16, 16), 1.0)
    exact = eyes(*pad([noise(30, 40)]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(eyes(*pad([noise(30, 40)])), exact)


def test_without_a_sample_rate_the_dual_encoder_sees_pictures(models) -> None:
    encoder = registry.build(ModelSettings(dim=16, width=0.25), None)
    assert isinstance(encoder.audio, TinyImage)
    rows = encoder.eval().encode_audio(*pad([noise(20, 30), noise(9, 64)]))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    other = registry.build(ModelSettings(dim=16, width=0.25, image=f"hf:{models['vit']}"), None)
    assert other.encode_audio(*pad([noise(20, 30)])).shape == (1, 16)


@pytest.mark.parametrize("name", ["tiny", "hf:vit", "hf:convnext"])
def test_scores_of_pictures_and_captions_are_those_of_their_pairs_one_by_one(models, name: str) -> None:
    image = f"hf:{models[name.removeprefix('hf:')]}" if name.startswith("hf:") else name
    torch.manual_seed(0)
    encoder = registry.build(ModelSettings(dim=16, width=0.25, dropout=0.0, image=image, interaction="late"), None).eval()
    torch.nn.init.normal_(encoder.audio_tokens.weigh.weight)
    pictures, captions = [noise(20, 30), noise(64, 33), noise(40, 90)], ["a dog", "", "a red circle left of a blue square"]
    together = scores(encoder.audio_encoding(*pad(pictures)), encoder.text_encoding(*encoder.tokenise(captions)))
    with torch.no_grad():
        for row, picture in enumerate(pictures):
            for column, caption in enumerate(captions):
                seen, read = encoder.audio_encoding(*pad([picture])), encoder.text_encoding(*encoder.tokenise([caption]))
                torch.testing.assert_close(together[row, column], scores(seen, read)[0, 0], atol=1e-5, rtol=0)
    functional.cross_entropy(together, torch.arange(3)).backward()
    lacking = [name for name, of in encoder.named_parameters() if of.requires_grad and of.grad is None]
    assert lacking == ["log_temperature"]
