"""timm's state dicts and `config.json`: ViT, DeiT, DINOv2, SigLIP's tower and hybrids (`reading`,
`writing`), BiT's ResNets and Mixers (`resnet_mixer`). Tensors are named as timm 1.0 names them.
"""

from __future__ import annotations

from patchword.models.model import Model
from patchword.models.vit import ViT
from patchword.spec.model import MixerSpec, ResNetSpec, ViTSpec
from patchword.spec.parse import PatchwordError
from patchword.weights.held import ANY, COMMON, MIXER, VIT, Held, Near, check_held
from patchword.weights.mapping import Reading, Written
from patchword.weights.shapes import Config, Hints, Shapes
from patchword.weights.timm import reading, resnet_mixer, writing
from patchword.weights.timm.config import architecture
from patchword.weights.timm.names import GROUP_EPS, LAYER_EPS

FAMILIES = (
    (reading.recognises, reading.find),
    (resnet_mixer.is_mixer, resnet_mixer.find_mixer),
    (resnet_mixer.is_bit, resnet_mixer.find_bit),
)
GROUP_NORM = Near(GROUP_EPS, "GroupNorm")
HELD: Held = {
    ViTSpec: {
        **VIT,
        "stem": {
            **dict.fromkeys(("layers", "weight_eps", "weight_eps_in"), ANY),
            "norm_eps": GROUP_NORM,
        },
        "pool": ("token", "gap", "map"),
        "pool_norm": ANY,
        "position": ("none", "learned-1d", "learned-2d", "sincos2d"),
        "activation": ANY,
        "layer_scale": ANY,
        "registers": ANY,
        "distillation": ANY,
        "qk_norm": ANY,
        "norm_eps": ANY,
    },
    ResNetSpec: {
        **COMMON,
        **dict.fromkeys(("layers", "width_factor", "weight_eps"), ANY),
        "norm_eps": GROUP_NORM,
    },
    MixerSpec: {**MIXER, "norm_eps": Near(LAYER_EPS, "LayerNorm")},
}


def recognises(shapes: Shapes, config: Config) -> bool:
    """Whether names or configuration are timm's."""
    known = any(recognised(shapes) for recognised, _ in FAMILIES)
    return known or ("pretrained_cfg" in config and bool(architecture(config)))


def find(shapes: Shapes, config: Config, hints: Hints) -> Reading:
    """The spec and the rules of timm's names and shapes. `config` is its `config.json`, {} if there
    is none; `hints` are fields of the spec that win over what is inferred.

    Raises `PatchwordError` if it is no model that patchword has."""
    for recognised, find_family in FAMILIES:
        if recognised(shapes):
            return find_family(shapes, config, hints)
    name = architecture(config) or "model"
    raise PatchwordError(
        f"timm's {name} is none that patchword has: those are ViTs, DeiTs, hybrids, BiT ResNets "
        "and MLP-Mixers; use timm"
    )


def write(model: Model) -> Written:
    """State dict and `config.json` from which `timm.create_model` builds the same model.

    A position of the class and distillation tokens that is zero throughout is left out, as in
    timm's `no_embed_class`. Raises `PatchwordError` if timm has no such model."""
    spec = model.spec
    check_held(spec, HELD, "timm")
    if isinstance(model, ViT):
        return writing.write(model)
    if isinstance(spec, MixerSpec):
        return resnet_mixer.write_mixer(model, spec)
    assert isinstance(spec, ResNetSpec)
    return resnet_mixer.write_bit(model, spec)
