"""Google's npz files of google-research/big_transfer: BiT ResNets (arXiv 1912.11370); read only.

Numerics of that code: GroupNorm has eps 1e-5; weight standardisation divides by the root of
(variance + 1e-10); padding is the same on all sides. It evaluates on images stretched to a square,
bilinear (there without antialiasing).
"""

from __future__ import annotations

import re
from typing import Any

from patchword.models.resnet import BIT_WIDTH
from patchword.spec.model import ResNetSpec
from patchword.spec.parse import PatchwordError
from patchword.weights.google.flax import CONVOLUTION, assumed_size, classes_in, preprocess
from patchword.weights.mapping import TRANSPOSED, Reading, Rule, chain, rule, viewed
from patchword.weights.shapes import Config, Hints, Shapes, count, shape_of, spec_of

CONV = "standardized_conv2d/kernel"
ROOT = f"resnet/root_block/{CONV}"
NUMBERED = re.compile(r"/standardized_conv2d_\d+/")
"""Some files number the layer, with no meaning."""


def recognises(shapes: Shapes, config: Config) -> bool:
    """Whether the names are those of a BiT ResNet."""
    return ROOT in _plain(shapes)


def find(shapes: Shapes, config: Config, hints: Hints) -> Reading:
    """The model that names and shapes tell. Raises `PatchwordError` if they tell none."""
    names = _plain(shapes)
    channels, width = shape_of(shapes, names[ROOT], 4)[2:]
    if width < BIT_WIDTH or width % BIT_WIDTH:
        raise PatchwordError(
            f"the tensor {names[ROOT]} has {width} channels; a BiT ResNet has a multiple of "
            f"{BIT_WIDTH}"
        )
    size, notes = assumed_size(1, hints)
    layers = [count(shapes, rf"resnet/block{stage}/unit(\d+)/") - 1 for stage in range(1, 5)]
    fields: dict[str, Any] = {
        "image_size": size,
        "in_channels": channels,
        "num_classes": classes_in(shapes, "resnet/head/conv2d/kernel", 4),
        "layers": layers,
        "width_factor": width // BIT_WIDTH,
    }
    spec = spec_of(ResNetSpec, fields, hints)
    return Reading(
        spec=spec,
        rules=[
            Rule(r.ours, tuple(names.get(name, name) for name in r.theirs), r.op)
            for r in _rules(spec)
        ],
        preprocess=preprocess(channels, resize="stretch"),
        ignored=("(?!resnet/).*",),
        notes=notes,
    )


def _plain(shapes: Shapes) -> dict[str, str]:
    """The file's names by what they are without a number."""
    return {NUMBERED.sub("/standardized_conv2d/", name): name for name in shapes}


def _rules(spec: ResNetSpec) -> list[Rule]:
    features = 32 * BIT_WIDTH * spec.width_factor
    rules = [rule("root.weight", ROOT, CONVOLUTION), *_norm("norm", "resnet")]
    for stage, units in enumerate(spec.layers):
        block = f"resnet/block{stage + 1}"
        for unit in range(units):
            ours, theirs = f"stages.{stage}.{unit}", f"{block}/unit{unit + 1:02d}"
            for k, part in enumerate("abc", 1):
                rules.append(rule(f"{ours}.conv{k}.weight", f"{theirs}/{part}/{CONV}", CONVOLUTION))
                rules += _norm(f"{ours}.norm{k}", f"{theirs}/{part}")
        down = f"{block}/unit01/a/proj/{CONV}"
        rules.append(rule(f"stages.{stage}.0.downsample.weight", down, CONVOLUTION))
    if spec.num_classes:
        matrix = (features, spec.num_classes)
        head, op = "resnet/head/conv2d", chain(viewed(matrix, (1, 1, *matrix)), TRANSPOSED)
        rules.append(rule("head.weight", f"{head}/kernel", op))
        rules.append(rule("head.bias", f"{head}/bias"))
    return rules


def _norm(ours: str, theirs: str) -> list[Rule]:
    gamma = rule(f"{ours}.weight", f"{theirs}/group_norm/gamma")
    return [gamma, rule(f"{ours}.bias", f"{theirs}/group_norm/beta")]
