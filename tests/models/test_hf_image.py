"""Any vision model of transformers as a tower: seen as its own processor shows it, each picture on its own, ready to train."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    EfficientNetImageProcessor,
    LevitImageProcessor,
    MobileNetV2ImageProcessor,
    MobileViTImageProcessor,
    PerceiverImageProcessor,
    PoolFormerImageProcessor,
    Qwen2VLImageProcessor,
    SiglipImageProcessor,
    VideoMAEImageProcessor,
    ViTImageProcessor,
)

from ask_ray.config import SettingsError
from ask_ray.data.batches import pad
from ask_ray.models.hf_image import HfImage, view_of
from ask_ray.models.pretrained import Origin
from ask_ray.models.weights import WeightsError

VIEWERS = ("vit", "clip-vision", "dinov2", "convnext")


def photos(*sides: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    """Smooth pictures of several sizes, as photographs are: (height, width, 3) uint8."""
    draw = np.random.default_rng(seed)
    made = []
    for height, width in sides:
        rows, columns = np.mgrid[:height, :width] / 20.0
        waves = [np.sin(a * rows + b * columns + c) for a, b, c in draw.uniform(0.2, 1.0, (3, 3))]
        made.append(np.rint(127.5 + 127.5 * np.stack(waves, axis=2)).astype(np.uint8))
    return made


@pytest.mark.parametrize("name", VIEWERS)
def test_pictures_look_as_the_models_own_processor_shows_them(models, name: str) -> None:
    tower = HfImage(str(models[name]), "mean", 0.9).eval()
    processor = AutoImageProcessor.from_pretrained(models[name])
    for photo in photos((48, 64), (70, 50), (200, 90), (32, 32)):
        theirs = processor(photo, return_tensors="pt")["pixel_values"]
        ours = tower.eyes(*pad([photo]))
        assert ours.shape == theirs.shape == (1, 3, 32, 32)
        # Pillow rounds to whole shades after resizing, and its cubic filter differs a little at the picture's edges.
        shade = 1 / (255 * min(processor.image_std))
        assert (ours - theirs).abs().mean() < shade
        assert (ours - theirs).abs().max() < 4 * shade


@pytest.mark.parametrize("name", VIEWERS)
@pytest.mark.parametrize("pooling", ["mean", "max", "first", "pooler"])
def test_a_pictures_vector_and_tokens_do_not_depend_on_its_batch(models, name: str, pooling: str) -> None:
    tower = HfImage(str(models[name]), pooling, 0.9).eval()
    some = photos((48, 64), (90, 40), (33, 32), (64, 64))
    with torch.inference_mode():
        together = tower(*pad(some))
        alone = torch.cat([tower(*pad([one])) for one in some])
        made, single = tower.encode(*pad(some)), [tower.encode(*pad([one])) for one in some]
    assert together.shape == (4, tower.width)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(made.vectors, together)
    assert made.tokens.shape == (*made.mask.shape, tower.token_width)
    assert made.mask.all()
    torch.testing.assert_close(made.tokens, torch.cat([one.tokens for one in single]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("name", VIEWERS)
def test_every_trainable_parameter_has_a_gradient(models, name: str) -> None:
    tower = HfImage(str(models[name]), "mean", 0.9)
    assert tower.training
    tower(*pad(photos((48, 64), (40, 40)))).square().sum().backward()
    lacking = [name for name, of in tower.named_parameters() if of.requires_grad and of.grad is None]
    assert lacking == []


def test_the_vision_tower_of_clip_is_taken_without_its_text(models) -> None:
    tower = HfImage(str(models["clip-vision"]), "pooler", 0.9)
    assert type(tower.model).__name__.startswith("CLIPVision")
    assert tower.width == 16


def test_what_is_no_vision_model_and_what_is_not_there_is_refused(models, tmp_path: Path) -> None:
    for name in ("ast", "bert"):
        with pytest.raises(WeightsError, match=r"model\.image: .*"):
            HfImage(str(models[name]), "mean", 0.9)
    with pytest.raises(WeightsError, match=r"model\.image: no/such-model .*give a local folder"):
        HfImage("no/such-model", "mean", 0.9)
    with pytest.raises(WeightsError, match=r"model\.image: .*could not be loaded.*give a local folder"):
        HfImage(str(tmp_path), "mean", 0.9)


def test_a_processor_that_does_not_bring_pictures_to_one_size_is_refused(models, tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    shutil.copytree(models["vit"], folder)
    told = json.loads((folder / "preprocessor_config.json").read_text())
    for change in ({"do_resize": False}, {"resample": 4}, {"size": {"longest_edge": 32}}):
        (folder / "preprocessor_config.json").write_text(json.dumps(told | change))
        with pytest.raises(WeightsError, match=r"model\.image: .*(one size|could not be loaded)"):
            HfImage(str(folder), "mean", 0.9)
    (folder / "preprocessor_config.json").write_text(json.dumps(told | {"size": {"height": 40, "width": 40}}))
    with pytest.raises(WeightsError, match=r"model\.image: .*gives no features .*one picture of 40 × 40 pixels"):
        HfImage(str(folder), "mean", 0.9)


SQUARE, SHORTEST = {"height": 32, "width": 32}, {"shortest_edge": 32}


@pytest.mark.parametrize(
    "processor",
    [
        MobileViTImageProcessor(size=SHORTEST, crop_size=SQUARE),
        LevitImageProcessor(size=SHORTEST, crop_size=SQUARE),
        PoolFormerImageProcessor(size=SHORTEST, crop_size=SQUARE),
        EfficientNetImageProcessor(size=SQUARE),
        EfficientNetImageProcessor(size=SQUARE, include_top=False, rescale_offset=True),
        DeiTImageProcessor(size={"height": 40, "width": 40}, crop_size=SQUARE),
        MobileViTImageProcessor(),
        LevitImageProcessor(),
        PoolFormerImageProcessor(),
        EfficientNetImageProcessor(),
        # Those show something of another shape, or take no single picture so.
        PerceiverImageProcessor(),
        VideoMAEImageProcessor(),
        Qwen2VLImageProcessor(),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_a_processor_that_does_something_else_is_refused(models, tmp_path: Path, processor) -> None:
    folder = tmp_path / "vit"
    shutil.copytree(models["vit"], folder)
    processor.save_pretrained(folder)
    name = type(AutoImageProcessor.from_pretrained(folder)).__name__
    with pytest.raises(WeightsError, match=rf"model\.image: .*its {name} does something else to pictures"):
        HfImage(str(folder), "mean", 0.9)


@pytest.mark.parametrize(
    "processor",
    [
        *(ViTImageProcessor(size=SQUARE, resample=resample) for resample in range(4)),
        ViTImageProcessor(resample=1),
        ViTImageProcessor(do_normalize=False),
        ViTImageProcessor(do_rescale=False, do_normalize=False),
        CLIPImageProcessor(),
        CLIPImageProcessor(size={"shortest_edge": 31}, crop_size={"height": 40, "width": 40}),
        BitImageProcessor(size={"shortest_edge": 37}, crop_size=SQUARE),
        ConvNextImageProcessor(),
        ConvNextImageProcessor(size={"shortest_edge": 224}),
        SiglipImageProcessor(),
        MobileNetV2ImageProcessor(),
        MobileViTImageProcessor(do_flip_channel_order=False),
        EfficientNetImageProcessor(include_top=False),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_a_processor_is_taken_whatever_its_filter_and_its_sizes(processor) -> None:
    view = view_of(processor, Origin("model.image", "some", Path("some")))
    theirs = processor(photos((300, 200))[0], return_tensors="pt")["pixel_values"]
    assert theirs.shape == (1, 3, view.height, view.width)


def test_a_pooling_that_a_model_lacks_is_refused(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor, ViTMAEConfig, ViTMAEModel

    made = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTMAEModel(ViTMAEConfig(**made, image_size=32, patch_size=8, mask_ratio=0.0)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match=r"model\.image_pooling.*choose mean"):
        HfImage(str(tmp_path), "pooler", 0.9)


def test_a_model_that_leaves_out_parts_of_a_picture_at_random_is_refused(models) -> None:
    for pooling in ("mean", "first"):
        with pytest.raises(WeightsError, match=r"model\.image: .*ViTMAEModel makes other features of the same input each time"):
            HfImage(str(models["vit-mae"]), pooling, 0.9)
