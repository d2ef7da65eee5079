"""Any vision model of the transformers library as a tower, with the size and the colours of its own image processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from ask_ray.models.image_towers import Eyes, ImageTower, View
from ask_ray.models.pooling import Encoded
from ask_ray.models.pretrained import Origin, pooled, read_config, read_model, read_processor, settled, states_of
from ask_ray.models.weights import WeightsError

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

#: Pillow's numbers of filters, by which processors name them, as modes of torch's interpolation; torch has no Lanczos filter.
FILTERS = {0: "nearest-exact", 1: "bicubic", 2: "bilinear", 3: "bicubic"}

#: ConvNeXt's processor cuts the middle out of pictures below this size only.
CONVNEXT_WHOLE = 384

#: How far a view may be from what the processor shows, on average, as a share of its spread. Rounding makes 0.006, a filter that
#: torch lacks 0.024, the least of what else processors do by default 0.36.
ALIKE = 0.05


class HfImage(ImageTower):
    """A transformers vision model (ViT, CLIP's vision tower, DINOv2, ConvNeXt, …) from a folder or the hub.

    Pictures are resized and normalised with torch, with the numbers of the model's own processor.
    """

    def __init__(self, name: str, pooling: str, crop: float) -> None:
        """`name` is a local folder or hub id; for `pooling` see :func:`ask_ray.models.pretrained.pooled`, for `crop`
        :class:`Eyes`.

        Raises:
            WeightsError: if the model cannot be had, is none of pictures, or leaves parts of them out at random.
            SettingsError: if it cannot be pooled so.
        """
        from transformers import AutoModel

        super().__init__()
        origin = Origin.of(name, "model.image")
        self.pooling = pooling
        self.eyes = Eyes(view_of(read_processor(origin), origin), crop)
        self.model, lacking = read_model(AutoModel, read_config(origin), origin, "vision_model")
        view = self.eyes.view
        noise = torch.randint(256, (1, 3, view.height, view.width), generator=torch.Generator().manual_seed(0)).byte()
        self.eval()
        probe = settled(
            self.model,
            lambda: self.encode(noise, torch.tensor([noise.shape[2:]])),
            lacking,
            origin,
            f"a vision model that takes one picture of {view.height} × {view.width} pixels as pixel_values",
        )
        self.width = probe.vectors.shape[1]
        self.token_width = None if probe.tokens is None else probe.tokens.shape[2]
        self.train()

    def encode(self, pictures: Tensor, sizes: Tensor) -> Encoded:
        """See :meth:`ImageTower.encode`. Tokens are the last hidden states, a ViT's class token among them."""
        made = self.model(pixel_values=self.eyes(pictures, sizes))
        vectors, states = pooled(made, None, self.pooling), states_of(made)
        if states is None:
            return Encoded(vectors, None, None)
        return Encoded(vectors, states, states.new_ones(states.shape[:2], dtype=torch.bool))


def view_of(processor: BaseImageProcessor, origin: Origin) -> View:
    """What a processor does to one picture.

    Raises:
        WeightsError: if it does something else than resizing, cutting out the middle and normalising.
    """
    size, crop = (_sides(getattr(processor, name, None)) for name in ("size", "crop_size"))
    shorter, final = size.get("shortest_edge"), size
    if getattr(processor, "do_center_crop", False) and crop:
        final = crop
    elif shorter is not None and (share := getattr(processor, "crop_pct", None)):
        final = {"height": shorter, "width": shorter}
        shorter = int(shorter / share) if shorter < CONVNEXT_WHOLE else None
    elif shorter is not None:
        final = {"height": shorter, "width": shorter}
    told = {name: getattr(processor, name, None) for name in ("do_resize", "resample")}
    if not told["do_resize"] or not {"height", "width"} <= final.keys() or told["resample"] not in FILTERS:
        raise WeightsError(
            f"{origin}: its {type(processor).__name__} does not bring pictures to one size (do_resize, size, crop_size and "
            "resample of preprocessor_config.json); give a model whose does"
        )
    view = View(
        int(final["height"]),
        int(final["width"]),
        shorter,
        FILTERS[told["resample"]],
        255 * processor.rescale_factor if processor.do_rescale else 255.0,
        tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
        tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
    )
    if not _alike(view, processor):
        raise WeightsError(
            f"{origin}: its {type(processor).__name__} does something else to pictures than resizing, cutting out the middle "
            "and normalising (preprocessor_config.json), so the model would see other pictures than it learnt from; give a "
            "model whose does not"
        )
    return view


def _alike(view: View, processor: BaseImageProcessor) -> bool:
    """Whether a view shows a picture as the processor does, but for how they round and filter.

    The picture is of patches of random colours: another order of colours, cut or shape shows, the shift by a pixel where halves
    are rounded does not. Twice as wide as high, it is cut.
    """
    patches = torch.rand((1, 3, 8, 16), generator=torch.Generator().manual_seed(0))
    picture = (255 * functional.interpolate(patches, (240, 480), mode="bilinear")[0]).byte()
    try:
        theirs = processor(picture.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"].float()
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError):
        return False
    # Shapes first: there are processors whose sizes count all pixels, which as sides would not fit into memory.
    if theirs.shape != (1, 3, view.height, view.width):
        return False
    return bool((view.of(picture) - theirs[0]).abs().mean() <= ALIKE * theirs.std())


def _sides(given: Any) -> dict[str, int]:
    """The sides that a processor names."""
    return {name: value for name, value in dict(given or {}).items() if value is not None}
