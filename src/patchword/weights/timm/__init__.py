"""timm's state dicts and `config.json`: ViT, DeiT, DINOv2, SigLIP's tower and hybrids (`reading`,
`writing`), BiT's ResNets and Mixers (`resnet_mixer`). Tensors are named as timm 1.0 names them.
"""

from __future__ import annotations

from typing import Any

from patchword.models.mixer import Mixer
from patchword.models.model import Model
from patchword.models.resnet import ResNet
from patchword.models.vit import ViT
from patchword.spec.parse import PatchwordError
from patchword.weights.mapping import Config, Found, Shapes, Written
from patchword.weights.timm import reading, resnet_mixer, writing
from patchword.weights.timm.config import architecture


def recognises(shapes: Shapes, config: Config) -> bool:
    """Whether names or configuration are timm's."""
    known = (
        reading.recognises(shapes) or resnet_mixer.is_mixer(shapes) or resnet_mixer.is_bit(shapes)
    )
    return known or ("pretrained_cfg" in config and bool(architecture(config)))


def find(shapes: Shapes, config: Config, hints: dict[str, Any]) -> Found:
    """The spec and the rules of timm's names and shapes. `config` is its `config.json`, {} if there
    is none; `hints` are fields of the spec that win over what is inferred.

    Raises `PatchwordError` if it is no model that patchword has."""
    if reading.recognises(shapes):
        return reading.find(shapes, config, hints)
    if resnet_mixer.is_mixer(shapes):
        return resnet_mixer.find_mixer(shapes, config, hints)
    if resnet_mixer.is_bit(shapes):
        return resnet_mixer.find_bit(shapes, config, hints)
    name = architecture(config) or "model"
    raise PatchwordError(
        f"timm's {name} is none that patchword has: those are ViTs, DeiTs, hybrids, BiT ResNets "
        "and MLP-Mixers; use timm"
    )


def write(model: Model) -> Written:
    """State dict and `config.json` from which `timm.create_model` builds the same model.

    A position of the class and distillation tokens that is zero throughout is left out, as in
    timm's `no_embed_class`. Raises `PatchwordError` if timm has no such model."""
    match model:
        case ViT():
            return writing.write(model)
        case Mixer():
            return resnet_mixer.write_mixer(model)
        case ResNet():
            return resnet_mixer.write_bit(model)
        case _:
            raise PatchwordError(f"timm's format has no place for a {type(model).__name__}")
