"""Well-known weights on the Hugging Face hub that patchword reads, one row each.

Standard library only. Hub ids, licences and sizes are those of timm's registry, for `google/` of
the model's card; `top1` is from timm's `results/results-imagenet.csv`, which measured all of them
alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from patchword.spec.parse import UsageError, nearest


@dataclass(frozen=True)
class Pretrained:
    """Weights that `--init` and `load_model` take by name."""

    name: str
    model: str
    """the variant"""
    hub: str
    """ORG/NAME"""
    top1: float | None
    """ImageNet accuracy in percent at `image_size`; None for features without a head"""
    data: str
    """what they were trained on"""
    source: str
    """the publication, and for features what their authors reached with them"""
    image_size: int = 224
    """one side, in pixels"""
    licence: str = "apache-2.0"
    """as SPDX names it"""


PRETRAINED: dict[str, Pretrained] = {}


def _add(
    name: str, model: str, hub: str, top1: float | None, data: str, source: str, **more: Any
) -> None:
    PRETRAINED[name] = Pretrained(name, model, hub, top1, data, source, **more)


IN1K, IN21K, BOTH = "ImageNet", "ImageNet-21k", "ImageNet-21k, ImageNet"
ORIGINAL, AUGREG = "arXiv 2010.11929", "arXiv 2106.10270"

for _name, _model, _hub, _top1 in (
    ("vit-tiny-augreg", "ViT-Ti/16", "vit_tiny_patch16_224", 75.454),
    ("vit-small-augreg", "ViT-S/16", "vit_small_patch16_224", 81.384),
    ("vit-base-32-augreg", "ViT-B/32", "vit_base_patch32_224", 80.716),
    ("vit-base-augreg", "ViT-B/16", "vit_base_patch16_224", 84.532),
    ("vit-large-augreg", "ViT-L/16", "vit_large_patch16_224", 85.834),
    ("hybrid-small-augreg", "R26+ViT-S/32", "vit_small_r26_s32_224", 81.864),
):
    _add(_name, _model, f"timm/{_hub}.augreg_in21k_ft_in1k", _top1, BOTH, AUGREG)

for _name, _model, _hub, _top1, _size in (
    ("vit-base", "ViT-B/16", "vit_base_patch16_224", 81.786, 224),
    ("vit-base-384", "ViT-B/16", "vit_base_patch16_384", 84.200, 384),
    ("hybrid-base-384", "R50+ViT-B/16", "vit_base_r50_s16_384", 84.976, 384),
):
    _hub = f"timm/{_hub}.orig_in21k_ft_in1k"
    _add(_name, _model, _hub, _top1, BOTH, ORIGINAL, image_size=_size)
_hub = "google/vit-base-patch16-224-in21k"
_about = f"{ORIGINAL}: 83.97 % fine-tuned at 384 px"
_add("vit-base-21k", "ViT-B/16", _hub, None, IN21K, _about)

for _name, _model, _hub, _top1, _data, _source in (
    ("deit-small", "ViT-S/16", "deit_small_patch16_224.fb_in1k", 79.844, IN1K, "2012.12877"),
    ("deit-base", "ViT-B/16", "deit_base_patch16_224.fb_in1k", 81.992, IN1K, "2012.12877"),
    ("deit3-base", "ViT-B/16", "deit3_base_patch16_224.fb_in22k_ft_in1k", 85.7, BOTH, "2204.07118"),
    ("mixer-base", "Mixer-B/16", "mixer_b16_224.goog_in21k_ft_in1k", 76.602, BOTH, "2105.01601"),
):
    _add(_name, _model, f"timm/{_hub}", _top1, _data, f"arXiv {_source}")
_hub = "timm/resnetv2_50x1_bit.goog_in21k_ft_in1k"
_add("bit-r50x1", "BiT-R50x1", _hub, 80.34, BOTH, "arXiv 1912.11370", image_size=448)

for _name, _model, _hub, _source, _top1 in (
    ("dinov2-small", "ViT-S/14", "vit_small_patch14_dinov2", "2304.07193", 81.1),
    ("dinov2-base", "ViT-B/14", "vit_base_patch14_dinov2", "2304.07193", 84.5),
    ("dinov2-base-registers", "ViT-B/14", "vit_base_patch14_reg4_dinov2", "2309.16588", 84.6),
):
    _about = f"arXiv {_source}: {_top1} % with a linear classifier"
    _hub = f"timm/{_hub}.lvd142m"
    _add(_name, _model, _hub, None, "LVD-142M, no labels", _about, image_size=518)
_hub = "timm/vit_base_patch16_siglip_224.webli"
_add("siglip-base", "ViT-B/16", _hub, None, "WebLI, images with texts", "arXiv 2303.15343")
_hub, _about = "timm/vit_base_patch16_224.mae", "arXiv 2111.06377: 83.6 % fine-tuned"
_add("mae-base", "ViT-B/16", _hub, None, "ImageNet, no labels", _about, licence="cc-by-nc-4.0")

SUGGESTED = "vit-small-augreg"
"""where nothing else is known: small, and the best of its size"""


def find_pretrained(name: str) -> Pretrained:
    """The row of that name. Raises `UsageError` naming the nearest ones."""
    if name not in PRETRAINED:
        raise UsageError(f"unknown pretrained weights {name!r}{nearest(name, PRETRAINED)}")
    return PRETRAINED[name]


def suggested(model: str) -> Pretrained:
    """The weights to start from rather than to train the variant `model` from scratch: the first
    of the same variant with a published accuracy, else `SUGGESTED`."""
    same = [row for row in PRETRAINED.values() if row.model == model and row.top1 is not None]
    return (same or [PRETRAINED[SUGGESTED]])[0]
