"""What a format holds of a spec is written and read back; all else is refused, by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from patchword import Model, PatchwordError, UsageError, load_model, save_model
from patchword.models.mixer import Mixer
from patchword.models.resnet import ResNet
from patchword.models.zoo import unfilled_model
from patchword.spec.model import MixerSpec, ModelSpec, ResNetSpec, StemSpec, ViTSpec
from patchword.spec.parse import parse, to_dict
from patchword.weights import huggingface, timm, torchvision
from patchword.weights.google import google_npz
from patchword.weights.load import describe_weights
from patchword.weights.save import writable_formats
from patchword.weights.timm import resnet_mixer

SUFFIXES = {"google-npz": ".npz", "patchword": ".safetensors", "torchvision": ".pth"}
"""of files; the others are folders"""
BODY: dict[str, Any] = {"image_size": (16, 16), "patch_size": (8, 8), "depth": 1, "num_classes": 3}
VIT = ViTSpec(**BODY, width=32, mlp_width=64, heads=1)
RESNET = ResNetSpec(layers=(1, 1, 1, 1), image_size=(16, 16), num_classes=3)
MIXER = MixerSpec(**BODY, width=32, tokens_mlp_width=8, channels_mlp_width=8)
BASES: dict[str, ModelSpec] = {"vit": VIT, "resnet": RESNET, "mixer": MIXER}
OTHERS: dict[str, list[Any]] = {
    "image_size": [(32, 32), (16, 32)],
    "in_channels": [1],
    "num_classes": [0, 7],
    "probability": ["sigmoid"],
    "depth": [2],
    "width": [64],
    "mlp_width": [40],
    "heads": [2],
    "patch_size": [(16, 16), (8, 4)],
    "stem": [to_dict(StemSpec(layers=())), to_dict(StemSpec(layers=(), width=32))],
    "pool": ["gap", "map", "token+gap"],
    "pool_norm": [True],
    "head": ["mlp"],
    "head_width": [12],
    "position": ["none", "learned-2d", "relative", "sincos2d", "rotary"],
    "position_at": ["every", "every-shared"],
    "activation": ["gelu_tanh", "swiglu"],
    "dropout": [0.1],
    "drop_path": [0.1],
    "patch_dropout": [0.1],
    "layer_scale": [0.1],
    "registers": [2],
    "distillation": ["token", "head"],
    "qk_norm": [True],
    "norm_eps": [1e-3],
    "layers": [(2, 1, 1, 1)],
    "width_factor": [2],
    "weight_eps": [1e-5],
    "tokens_mlp_width": [12],
    "channels_mlp_width": [12],
}
"""Values of every field that are not those of the bases."""
BESIDE: dict[str, dict[str, Any]] = {"pool_norm": {"pool": "gap"}, "head_width": {"head": "mlp"}}
"""Without which they would be refused by the spec itself."""
TRAINING = ("dropout", "drop_path", "patch_dropout")
"""of no effect on what a written model computes"""
EQUIVALENT = ("position", "distillation")
"""of what timm and Hugging Face have in a form that computes the same: a table, a register"""
UNTOLD = ("heads", "activation", "norm_eps", "weight_eps", "probability")
"""what a file need not tell, and the log then says"""


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm has names for the small models, as for the large ones that it has."""
    monkeypatch.setitem(resnet_mixer.BITS, (RESNET.layers, 1), "resnetv2_50x1_bit")
    monkeypatch.setitem(resnet_mixer.MIXERS, (1, 32, 8), "mixer_s16_224")


def scattered(spec: ModelSpec) -> Model:
    """A model with nothing left at zero."""
    model = unfilled_model(spec)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    drawn = {n: 0.1 * torch.randn(shape) + (len(shape) == 1) for n, shape in shapes.items()}
    model.load_state_dict(drawn, assign=True)
    return model.eval()


def place(folder: Path, format: str) -> Path:
    return folder / f"m{SUFFIXES.get(format, '')}"


def check_refusal(error: PatchwordError, field: str, spec: ModelSpec) -> None:
    """It names the field (or the one that it goes with), or the family, on one line."""
    names = [
        field,
        *BESIDE.get(field, ()),
        f"place for a {type(spec).__name__.removesuffix('Spec')}",
    ]
    assert not isinstance(error, UsageError)
    assert any(name in str(error) for name in names), error
    assert "\n" not in str(error)


def check_return(path: Path, model: Model, format: str, field: str, said: str) -> None:
    """What was written is the model, once the reader is told what the log said."""
    spec: Any = vars(model.spec)
    told = describe_weights(path, trust_pickle=True, image_size=model.spec.image_size).spec
    lost = [name for name in UNTOLD if name in spec and spec[name] != vars(told)[name]]
    assert all(f"{name}=" in said for name in lost)
    hints = {name: spec[name] for name in lost}
    loaded = load_model(path, trust_pickle=True, image_size=model.spec.image_size, **hints)
    if field not in ("stem", "weight_eps"):  # their eps are fixed elsewhere
        images = torch.randn(2, model.spec.in_channels, *model.spec.image_size)
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-4)
    back = vars(loaded.spec)[field]
    if format == "patchword" or field not in (*TRAINING, *EQUIVALENT, "stem"):
        assert back == spec[field]
    elif field == "stem":
        assert (back.layers, back.width) == (spec["stem"].layers, spec["stem"].width)


FAMILIES = {"patchword": [*BASES], "timm": [*BASES], "google-npz": ["vit", "mixer"]}
"""that a format has; the others have ViTs alone"""
CASES = [
    (format, base, field.name)
    for format in writable_formats()
    for base in FAMILIES.get(format, ["vit"])
    for field in dataclasses.fields(BASES[base])
]


@pytest.mark.parametrize(("format", "base", "field"), CASES)
def test_a_field_comes_back_or_is_refused_by_name(
    tmp_path: Path, base: str, field: str, format: str, caplog: pytest.LogCaptureFixture
):
    path = place(tmp_path, format)
    for value in OTHERS[field]:
        changes = {field: value} | BESIDE.get(field, {})
        if format == "google-npz":
            changes = {"activation": "gelu_tanh"} | changes
        try:
            spec = parse(type(BASES[base]), to_dict(BASES[base]) | changes)
        except UsageError:  # a Mixer with SwiGLU
            continue
        model = scattered(spec)
        caplog.clear()
        try:
            save_model(model, path, format=format, overwrite=True)
        except PatchwordError as error:
            check_refusal(error, field, spec)
        else:
            check_return(path, model, format, field, caplog.text)


# A field that nobody thought of -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewerViTSpec(ViTSpec):
    pattern: str = "full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewerMixerSpec(MixerSpec):
    pattern: str = "full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewerResNetSpec(ResNetSpec):
    pattern: str = "full"


WRITERS = {
    "timm": timm.write,
    "huggingface": huggingface.write,
    "torchvision": torchvision.write,
    "google-npz": google_npz.write,
}


def test_these_are_all_writers_of_other_formats():
    assert {*WRITERS, "patchword"} == set(writable_formats())


@pytest.mark.parametrize("format", WRITERS)
def test_a_new_field_of_a_spec_is_refused_by_every_other_format(tmp_path: Path, format: str):
    """At its default the model is written as before."""
    activation = "gelu_tanh" if format == "google-npz" else "gelu"
    values: dict[str, Any] = {**vars(VIT), "activation": activation}
    newer = NewerViTSpec(**values, pattern="window")
    model = scattered(VIT)
    model.spec = newer
    path = place(tmp_path, format)
    with pytest.raises(PatchwordError, match=r"no pattern window \(only full\); save the model in"):
        save_model(model, path, format=format)
    assert not path.exists()
    model.spec = dataclasses.replace(newer, pattern="full")
    save_model(model, path, format=format)


@pytest.mark.parametrize(
    ("model", "newer"),
    [
        (Mixer, lambda gelu: NewerMixerSpec(**vars(MIXER) | gelu, pattern="window")),
        (ResNet, lambda _: NewerResNetSpec(**vars(RESNET), pattern="window")),
    ],
)
@pytest.mark.parametrize("format", WRITERS)
def test_so_it_is_of_the_other_families(model: Any, newer: Any, format: str):
    with torch.device("meta"):
        built = model(newer({"activation": "gelu_tanh"} if format == "google-npz" else {}))
    with pytest.raises(PatchwordError, match=r"no (place for a|pattern window)"):
        WRITERS[format](built)
