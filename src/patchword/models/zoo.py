"""The named variants, one row each, and `create_model`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from patchword.models.mixer import Mixer
from patchword.models.model import Model
from patchword.models.resnet import ResNet
from patchword.models.vit import ViT
from patchword.spec.model import (
    FAMILIES,
    MixerSpec,
    ModelSpec,
    PreprocessSpec,
    ResNetSpec,
    StemSpec,
    ViTSpec,
)
from patchword.spec.parse import PatchwordError, UsageError, nearest, parse, to_dict


@dataclass(frozen=True)
class Shape:
    """A row of table 1."""

    depth: int
    width: int
    mlp_width: int
    heads: int


SHAPES = {
    "mu": Shape(1, 32, 128, 2),  # for tests, after big_vision
    "Ti": Shape(12, 192, 768, 3),
    "S": Shape(12, 384, 1536, 6),
    "b": Shape(12, 384, 1536, 12),  # B with every hidden dimension halved (figure 4)
    "B": Shape(12, 768, 3072, 12),
    "L": Shape(24, 1024, 4096, 16),
    "H": Shape(32, 1280, 5120, 16),
    "So400m": Shape(27, 1152, 4304, 16),
    "g": Shape(40, 1408, 6144, 16),
    "G": Shape(48, 1664, 8192, 16),
}
PATCHES = (8, 14, 16, 32)
NAME = re.compile(r"(?:(R\d*)\+)?(ViT|Mixer)-(\w+)/([1-9]\d*)")

STEMS = {
    ("R", 16): ((), 32),
    ("R26", 32): ((2, 2, 2, 2), 32),
    ("R50", 32): ((3, 4, 6, 3), 32),  # section 3.1, kind (i): the output of stage 4
    ("R50", 16): ((3, 4, 9), 16),  # kind (ii): stage 4's blocks in stage 3
}
"""Blocks per stage of a hybrid's stem, and its patches' side in pixels, by the two parts of its
name. AugReg's R+ViT-Ti/16 (arXiv 2106.10270) is named as if its root had stride 2; root and pooling
have 4, so that its patches, 8 x 8 pixels of the map, are 32 x 32 of the image."""
HYBRIDS = (
    "R+ViT-Ti/16",
    "R26+ViT-S/32",
    "R50+ViT-B/32",
    "R50+ViT-B/16",
    "R50+ViT-L/32",
    "R50+ViT-L/16",
)
RESNETS = {
    "BiT-R50x1": ((3, 4, 6, 3), 1),
    "BiT-R50x2": ((3, 4, 6, 3), 2),
    "BiT-R101x1": ((3, 4, 23, 3), 1),
    "BiT-R152x1": ((3, 8, 36, 3), 1),
    "BiT-R152x2": ((3, 8, 36, 3), 2),
    "BiT-R200x3": ((3, 24, 36, 3), 3),
}
"""Blocks per stage and width factor (tables 2 and 6)."""
MIXERS = {
    "S": {"depth": 8, "width": 512, "tokens_mlp_width": 256, "channels_mlp_width": 2048},
    "B": {"depth": 12, "width": 768, "tokens_mlp_width": 384, "channels_mlp_width": 3072},
    "L": {"depth": 24, "width": 1024, "tokens_mlp_width": 512, "channels_mlp_width": 4096},
}
"""arXiv 2105.01601, table 1."""


def list_models() -> list[str]:
    """Names of the standard variants, by family and smallest first. Other patch sizes of ViT and
    Mixer work too: `ViT-Ti/4`."""
    vits = [f"ViT-{shape}/{patch}" for shape in SHAPES for patch in PATCHES]
    mixers = ["Mixer-S/32", "Mixer-S/16", "Mixer-B/32", "Mixer-B/16", "Mixer-L/16"]
    return [*vits, *HYBRIDS, *RESNETS, *mixers]


def _row(name: str) -> tuple[type[ModelSpec], dict[str, Any]] | None:
    """The family and the fields that a name stands for."""
    if name in RESNETS:
        layers, factor = RESNETS[name]
        return ResNetSpec, {"layers": layers, "width_factor": factor}
    match = NAME.fullmatch(name)
    if not match:
        return None
    stem, kind, shape, patch = match[1], match[2], match[3], int(match[4])
    stem_spec = None
    if stem:
        if (stem, patch) not in STEMS:
            return None
        layers, patch = STEMS[stem, patch]
        stem_spec = StemSpec(layers=layers)
    fields: dict[str, Any] = {"patch_size": (patch, patch), "image_size": (patch, patch)}
    if kind == "Mixer" and shape in MIXERS and not stem:
        return MixerSpec, fields | MIXERS[shape]
    if kind == "ViT" and shape in SHAPES:
        return ViTSpec, fields | vars(SHAPES[shape]) | {"stem": stem_spec}
    return None


def model_family(name: str) -> type[ModelSpec]:
    """The class of a variant's spec. Raises `UsageError` on unknown names, with the nearest."""
    return _known_row(name)[0]


def _known_row(name: str) -> tuple[type[ModelSpec], dict[str, Any]]:
    row = _row(name)
    if row is None:
        raise UsageError(f"unknown model {name!r}{nearest(name, list_models())}")
    return row


def model_spec(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    **options: Any,
) -> ModelSpec:
    """The spec of a named variant with some fields changed. Names are case-sensitive (`ViT-b` is
    not `ViT-B`). Raises `UsageError` on unknown names and options, with the nearest valid."""
    family, base = _known_row(name)
    fields = {f.name for f in dataclasses.fields(family)}
    for option in options:
        if option not in fields:
            hint = nearest(option, sorted(fields))
            raise UsageError(f"unknown option {option!r} of {name}{hint}")
    if isinstance(options.get("patch_size"), int):
        options["patch_size"] = (options["patch_size"],) * 2
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    values = to_dict(family(**base)) | {
        "num_classes": num_classes,
        "image_size": size,
        "in_channels": in_channels,
    }
    return parse(family, values | options)


def create_model(
    name: str,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    *,
    preprocess: PreprocessSpec | None = None,
    classes: tuple[str, ...] = (),
    **options: Any,
) -> Model:
    """A freshly initialised model.

    `image_size` in pixels, one side or (height, width), multiples of the patch size (a BiT ResNet
    takes any). `num_classes=0` leaves out the head. `options` are fields of the family's spec:
    `create_model("ViT-B/16", pool="gap", drop_path=0.1)`, `create_model("ViT-Ti/4", 10, 32,
    depth=9)`. Raises `UsageError` on unknown names, options and values, naming the nearest valid.
    """
    spec = model_spec(
        name, num_classes=num_classes, image_size=image_size, in_channels=in_channels, **options
    )
    return build_model(spec, preprocess=preprocess, classes=classes)


MODELS: dict[type[ModelSpec], Callable[..., Model]] = {
    ViTSpec: ViT,
    ResNetSpec: ResNet,
    MixerSpec: Mixer,
}


def build_model(
    spec: ModelSpec, *, preprocess: PreprocessSpec | None = None, classes: tuple[str, ...] = ()
) -> Model:
    """A freshly initialised model of `spec`'s family."""
    return MODELS[type(spec)](spec, preprocess=preprocess, classes=classes)


def spec_to_dict(spec: ModelSpec) -> dict[str, Any]:
    """The JSON form of a spec, its family with it; a `head_width` of None is left out, as it was
    before there was such a field."""
    family = next(name for name, cls in FAMILIES.items() if type(spec) is cls)
    values = {"family": family} | to_dict(spec)
    return {name: v for name, v in values.items() if (name, v) != ("head_width", None)}


def spec_from_dict(values: dict[str, Any]) -> ModelSpec:
    """The spec of `spec_to_dict`. Raises `UsageError` on unknown families, keys and values."""
    family = values.get("family")
    if family not in FAMILIES:
        raise UsageError(f"unknown family {family!r}{nearest(str(family), FAMILIES)}")
    return parse(FAMILIES[family], {k: v for k, v in values.items() if k != "family"})


def resized(spec: ModelSpec, image_size: tuple[int, int]) -> ModelSpec:
    """The same model for another image size. Raises `PatchwordError` if it takes no other."""
    if isinstance(spec, MixerSpec) and tuple(image_size) != spec.image_size:
        raise PatchwordError(
            f"a Mixer takes images of its own size only, {spec.image_size[0]} x "
            f"{spec.image_size[1]}; leave out the image size"
        )
    return parse(type(spec), to_dict(spec) | {"image_size": list(image_size)})


def variant_name(spec: ModelSpec) -> str:
    """The name of a spec's variant, such as `ViT-S/16`; `ViT-6x128/4` (depth, width) if it is none
    of the table's."""
    if isinstance(spec, ResNetSpec):
        row = (spec.layers, spec.width_factor)
        known = next((name for name, known in RESNETS.items() if known == row), None)
        return known or f"BiT-{'.'.join(map(str, spec.layers))}x{spec.width_factor}"
    assert isinstance(spec, (ViTSpec, MixerSpec))
    rows, columns = spec.patch_size
    patch = str(rows) if rows == columns else f"{rows}x{columns}"
    if isinstance(spec, MixerSpec):
        known = next((n for n, r in MIXERS.items() if r.items() <= vars(spec).items()), None)
        return f"Mixer-{known or f'{spec.depth}x{spec.width}'}/{patch}"
    shape = Shape(spec.depth, spec.width, spec.mlp_width, spec.heads)
    known = next((name for name, row in SHAPES.items() if row == shape), None)
    stem = ""
    if spec.stem is not None:
        stem = f"R{'.'.join(map(str, spec.stem.layers)) or 0}"
        for (root, number), (layers, side) in STEMS.items():
            if (spec.stem.layers, spec.patch_size) == (layers, (side, side)):
                stem, patch = root, str(number)
        stem += "+"
    return f"{stem}ViT-{known or f'{spec.depth}x{spec.width}'}/{patch}"


class _Undrawn(TorchFunctionMode):
    """Draws no normal numbers: a meta tensor has none, and torch loads its compiler to say so."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        return options["tensor"] if func is nn.init.normal_ else func(*args, **options)


def unfilled_model(spec: ModelSpec) -> Model:
    """A model of `spec` on the meta device, without memory for its parameters."""
    with torch.device("meta"), _Undrawn():
        return build_model(spec)


def macs(spec: ModelSpec) -> int:
    """Multiply-accumulates of one image's forward pass, as the family's `macs` counts them."""
    return unfilled_model(spec).macs()


def model_cost(spec: ModelSpec) -> tuple[int, int]:
    """(parameters, multiply-accumulates per image), without allocating the model."""
    model = unfilled_model(spec)
    return sum(p.numel() for p in model.parameters()), model.macs()


def enlarged(spec: ModelSpec, times: float) -> tuple[int, int]:
    """The image size (height, width) nearest to `times` that of `spec` which the patches divide, of
    a ResNet its stride of 32; a Mixer's is its own."""
    if isinstance(spec, MixerSpec):
        return spec.image_size
    height, width = spec.patch_size if isinstance(spec, ViTSpec) else (32, 32)
    return (
        max(1, round(times * spec.image_size[0] / height)) * height,
        max(1, round(times * spec.image_size[1] / width)) * width,
    )
