"""Hugging Face transformers computes the same with the same weights, both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity_record import noted
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patchword.data.transforms import EvalTransform
from patchword.models.model import Model
from patchword.models.zoo import build_model, create_model
from patchword.spec.model import PreprocessSpec, ViTSpec
from patchword.spec.parse import PatchwordError
from patchword.weights import huggingface, mapping
from patchword.weights.mapping import Reading, Written
from peers import define_torchvision_operators

define_torchvision_operators()
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
"""of the largest value, in float32"""

BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SQUARE = BODY | {"image_size": 24, "patch_size": 8}
PLAIN = SQUARE | {"intermediate_size": 48}
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
TEACHER = "DeiTForImageClassificationWithTeacher"
REGISTERS = "Dinov2WithRegistersForImageClassification"
DECODER = {
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 8,
    "mask_ratio": 0.0,
}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", PLAIN | LABELS, {"pool": "token", "norm_eps": 1e-12}),
    "vit oblong": (
        "ViTForImageClassification",
        PLAIN | LABELS | {"image_size": [16, 24], "patch_size": [8, 4], "num_channels": 2},
        {"image_size": (16, 24), "patch_size": (8, 4), "in_channels": 2},
    ),
    "vit tanh": (
        "ViTForImageClassification",
        PLAIN | LABELS | {"hidden_act": "gelu_new", "layer_norm_eps": 0.1},
        {"activation": "gelu_tanh", "norm_eps": 0.1},
    ),
    "vit without qkv biases": (
        "ViTForImageClassification",
        PLAIN | LABELS | {"qkv_bias": False},
        {},
    ),
    "vit multi-label": (
        "ViTForImageClassification",
        PLAIN | LABELS | {"problem_type": "multi_label_classification"},
        {"probability": "sigmoid"},
    ),
    "vit body": ("ViTModel", PLAIN, {"num_classes": 0}),
    "deit": ("DeiTForImageClassification", PLAIN | LABELS, {"distillation": "token"}),
    "deit with teacher": (TEACHER, PLAIN | LABELS, {"distillation": "head"}),
    "dinov2": ("Dinov2ForImageClassification", SQUARE | LABELS, {"pool": "token+gap"}),
    "dinov2 body": ("Dinov2Model", SQUARE, {"pool": "token", "layer_scale": 1.0}),
    "dinov2 swiglu": (
        "Dinov2Model",
        SQUARE | {"use_swiglu_ffn": True},
        {"activation": "swiglu", "mlp_width": 88},
    ),
    "dinov2 registers": (REGISTERS, SQUARE | LABELS, {"registers": 4}),
    "dinov2 registers body": (
        "Dinov2WithRegistersModel",
        SQUARE | {"num_register_tokens": 3, "use_swiglu_ffn": True},
        {"registers": 3, "num_classes": 0},
    ),
    "mae body": ("ViTMAEModel", PLAIN | DECODER, {"num_classes": 0}),
    "mae": ("ViTMAEForPreTraining", PLAIN | DECODER, {"num_classes": 0}),
    "siglip body": ("SiglipVisionModel", PLAIN, {"pool": "map", "activation": "gelu_tanh"}),
    "siglip": (
        "SiglipForImageClassification",
        LABELS | {"vision_config": PLAIN},
        {"pool": "gap", "num_classes": 3, "norm_eps": 1e-6},
    ),
    "siglip without pooling": (
        "SiglipForImageClassification",
        LABELS | {"vision_config": PLAIN | {"vision_use_head": False}},
        {"pool": "gap", "num_classes": 3},
    ),
}


def build(case: str) -> Any:
    """Their model with every parameter drawn."""
    name, values, _ = CASES[case]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**values)).eval()
    draw(model)
    return model


def draw(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        nn.init.normal_(parameter, std=0.5 if parameter.ndim == 1 else 0.2)


def output(model: Any, images: Tensor) -> Tensor:
    """Logits, or what their class calls pooled; the class token where that is not what it is."""
    if isinstance(model, transformers.ViTMAEForPreTraining):
        model = model.vit
    values = model(images)
    if hasattr(values, "logits"):
        return values.logits
    if isinstance(model, (transformers.ViTModel, transformers.ViTMAEModel)):
        return values.last_hidden_state[:, 0]
    return values.pooler_output


def read(
    tensors: dict[str, Tensor], config: dict[str, Any], hints: dict[str, Any] | None = None
) -> tuple[Reading, Model]:
    """Our model of their tensors."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    assert huggingface.recognises(shapes, config)
    found = huggingface.find(shapes, config, hints or {})
    model = build_model(found.spec, preprocess=found.preprocess, classes=found.classes)
    model.load_state_dict(mapping.read(tensors.__getitem__, shapes, found, "test"))
    return found, model.eval()


def save(written: Written, folder: Path) -> Path:
    save_file(written.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(written.config))
    (folder / "preprocessor_config.json").write_text(json.dumps(written.preprocessor))
    return folder


def draw_images(spec: Any, count: int = 3) -> Tensor:
    return torch.randn(count, spec.in_channels, *spec.image_size)


def assert_close(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    scale = theirs.abs().max().clamp(min=1e-12)
    assert (ours - theirs).abs().max() <= TOLERANCE * scale, what


@pytest.mark.parametrize("source", ["memory", "file"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_outputs_and_gradients(case: str, source: str, tmp_path: Path) -> None:
    theirs = build(case)
    tensors, config = theirs.state_dict(), theirs.config.to_dict()
    if source == "file":
        theirs.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        config = json.loads((tmp_path / "config.json").read_text())
    found, ours = read(tensors, config)
    assert vars(found.spec).items() >= CASES[case][2].items()
    images = draw_images(found.spec)
    mine, other = images.clone().requires_grad_(), images.clone().requires_grad_()
    a, b = ours(mine), output(theirs, other)
    assert noted(float(((a - b).abs().max() / b.abs().max()).detach())) < TOLERANCE
    weights = torch.randn_like(a)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    assert mine.grad is not None
    assert other.grad is not None
    assert_close(mine.grad, other.grad)
    if source == "memory":  # there the names are those of the parameters
        expected = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in theirs.named_parameters()
        }
        shapes = {name: tuple(value.shape) for name, value in expected.items()}
        mapped = mapping.read(expected.__getitem__, shapes, found, "gradients")
        for name, parameter in ours.named_parameters():
            if case != "vit without qkv biases" or not name.endswith("qkv.bias"):
                assert parameter.grad is not None
                assert_close(parameter.grad, mapped[name], name)


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_loads_there_and_comes_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    theirs = build(case)
    found, ours = read(theirs.state_dict(), theirs.config.to_dict())
    written = huggingface.write(ours)
    cls = getattr(transformers, written.config["architectures"][0])
    assert cls is type(theirs) or case.startswith("mae")  # whose encoder is a plain ViT
    bare = {"add_pooling_layer": False} if cls is transformers.ViTModel else {}
    folder = save(written, tmp_path)
    loaded, report = cls.from_pretrained(folder, output_loading_info=True, **bare)
    assert not any(report.values()), report
    images = draw_images(found.spec)
    with torch.no_grad():
        assert_close(output(loaded.eval(), images), output(theirs, images))
    config = json.loads((folder / "config.json").read_text())
    config["preprocessor"] = json.loads((folder / "preprocessor_config.json").read_text())
    again, back = read(load_file(folder / "model.safetensors"), config)
    assert again.spec == found.spec
    assert again.classes == found.classes == (("cat", "dog", "owl") if back.head else ())
    fraction = found.preprocess.crop_fraction  # theirs is in whole pixels
    assert again.preprocess.crop_fraction == pytest.approx(fraction, abs=0.5 / 24)
    assert replace(again.preprocess, crop_fraction=fraction) == found.preprocess
    for name, value in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


CLASSIC = {
    "vit": "vit.encoder.layer.1.attention.attention.query.weight",
    "vit body": "encoder.layer.1.intermediate.dense.weight",
    "deit": "deit.encoder.layer.1.output.dense.bias",
    "dinov2": "dinov2.encoder.layer.1.layer_scale1.lambda1",
    "dinov2 swiglu": "encoder.layer.1.mlp.weights_in.weight",
    "dinov2 registers": "dinov2_with_registers.embeddings.register_tokens",
    "siglip body": "vision_model.head.attention.in_proj_weight",
}


@pytest.mark.parametrize("case", CLASSIC)
def test_written_names_are_those_of_the_hub(case: str) -> None:
    theirs = build(case)
    _, ours = read(theirs.state_dict(), theirs.config.to_dict())
    assert CLASSIC[case] in huggingface.write(ours).tensors


def test_mae_patches_agree_once_unshuffled() -> None:
    theirs = build("mae body")
    found, ours = read(theirs.state_dict(), theirs.config.to_dict())
    images = draw_images(found.spec)
    with torch.no_grad():
        values = theirs(images)
        tokens = values.last_hidden_state[:, 1:]
        order = values.ids_restore[:, :, None].expand_as(tokens)
        assert_close(ours.features(images).tokens, tokens.gather(1, order))


def test_left_out_tensors_are_noted() -> None:
    for case, word in (("vit body", "pooler"), ("mae", "decoder"), ("siglip", "pooling")):
        theirs = build(case)
        found, _ = read(theirs.state_dict(), theirs.config.to_dict())
        assert any(word in note for note in found.notes), case
    theirs = build("siglip body")
    whole = {f"vision_model.{name}": value for name, value in theirs.state_dict().items()}
    whole |= {"text_model.head.weight": torch.zeros(2, 2), "logit_scale": torch.zeros(1)}
    config = {"model_type": "siglip", "vision_config": PLAIN}
    found, ours = read(whole, config)
    assert any("text" in note for note in found.notes)
    images = draw_images(found.spec)
    assert_close(ours(images), output(theirs, images))


def test_a_lone_state_dict_takes_defaults_and_says_so() -> None:
    for case in ("vit", "deit", "dinov2 body", "mae", "siglip body"):
        theirs = build(case)
        found, ours = read(theirs.state_dict(), {}, {"heads": 4})
        assert "4 heads" in " ".join(found.notes)
        images = draw_images(found.spec)
        assert_close(ours(images), output(theirs, images), case)


def test_hints_win() -> None:
    theirs = build("vit oblong")
    size = {"image_size": (48, 8), "heads": 2, "norm_eps": 0.5, "activation": "gelu_tanh"}
    found, _ = read(theirs.state_dict(), theirs.config.to_dict(), size)
    assert vars(found.spec).items() >= size.items()
    with pytest.raises(PatchwordError, match="no square image"):
        read({**theirs.state_dict()}, {})


# Errors ------------------------------------------------------------------------------------------


def broken(change: Callable[[dict[str, Tensor]], object], **config: Any) -> None:
    theirs = build("vit")
    tensors = dict(theirs.state_dict())
    change(tensors)
    read(tensors, theirs.config.to_dict() | config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("vit.layers.0.mlp.fc1.bias"), "vit.layers.0.mlp.fc1.bias is missing"),
        (lambda t: t.pop("vit.layers.0.mlp.fc2.weight"), r"layers.0.mlp.fc2.weight is missing"),
        (lambda t: t.pop("vit.embeddings.position_embeddings"), "position_embeddings is missing"),
        (lambda t: t.update({"vit.extra": torch.ones(1)}), "vit.extra is unexpected"),
        (
            lambda t: t.update({"vit.layers.7.mlp.fc1.bias": torch.ones(1)}),
            "num_hidden_layers is 2, the tensors say 8",
        ),
        (
            lambda t: t.update({"vit.layers.0.attention.q_proj.weight": torch.ones(32)}),
            r"q_proj.weight is \[32\]",
        ),
        (
            lambda t: t.update({"vit.embeddings.position_embeddings": torch.ones(1, 9, 32)}),
            "8 patches, those of images of 24x24 px",
        ),
        (
            lambda t: t.update(
                {"vit.embeddings.patch_embeddings.projection.weight": torch.ones(32, 3, 8)}
            ),
            "not of 4 axes",
        ),
    ],
)
def test_broken_tensors_are_named(
    change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    with pytest.raises(PatchwordError, match=message):
        broken(change)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not known"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"model_type": "beit"}, "model_type 'beit'; did you mean deit"),
        ({"hidden_size": 64}, "hidden_size is 64, the tensors say 32"),
        ({"num_attention_heads": 5}, "width 32 is not a multiple of heads 5"),
        ({"num_attention_heads": "4"}, "heads must be int"),
        ({"image_size": {"height": 24}}, "image_size is"),
        ({"layer_norm_eps": -1.0}, "norm_eps is -1.0"),
        ({"preprocessor": [1]}, "preprocessor_config.json is no object"),
        ({"preprocessor": {"size": "large"}}, "size is 'large'"),
        ({"preprocessor": {"image_std": [0, 1, 1]}}, "std"),
        ({"preprocessor": {"rescale_factor": 0}}, "rescale_factor is 0"),
    ],
)
def test_contradicting_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchwordError, match=message):
        broken(lambda t: None, **config)


def test_other_names_are_not_recognised() -> None:
    assert not huggingface.recognises({"patch_embed.proj.weight": (8, 3, 4, 4)}, {})
    strange = {"beit.embeddings.patch_embeddings.projection.weight": (8, 3, 4, 4)}
    with pytest.raises(PatchwordError, match="no architecture known"):
        huggingface.find(strange, {}, {})


# Writing our own ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "cls"),
    [
        ("position sincos2d", {"position": "sincos2d"}, "ViTForImageClassification"),
        ("position none", {"position": "none"}, "ViTForImageClassification"),
        (
            "learned-2d, averaged",
            {"position": "learned-2d", "pool": "gap"},
            "SiglipForImageClassification",
        ),
        ("distillation body", {"distillation": "token", "num_classes": 0}, "DeiTModel"),
        ("tanh", {"activation": "gelu_tanh"}, "ViTForImageClassification"),
    ],
)
def test_our_own_models_load_there(
    name: str, options: dict[str, Any], cls: str, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"num_classes": 5, "depth": 2, "width": 32, "heads": 2} | options
    ours = create_model("ViT-Ti/8", image_size=24, mlp_width=40, **values).eval()
    draw(ours)
    written = huggingface.write(ours)
    assert written.config["architectures"] == [cls]
    theirs = getattr(transformers, cls).from_pretrained(save(written, tmp_path)).eval()
    images = draw_images(ours.spec)
    with torch.no_grad():
        found = theirs(images)
        b = found.logits if ours.spec.num_classes else found.last_hidden_state[:, 0]
        assert_close(ours(images), b)
    if ours.spec.num_classes:
        assert theirs.config.id2label[4] == "LABEL_4"
    _, back = read(written.tensors, written.config)
    assert back.classes == ()
    assert torch.equal(back(images), ours(images))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pool": "map"}, "pool map"),
        ({"registers": 2}, "registers 2"),
        ({"layer_scale": 0.1}, "layer_scale 0.1"),
        ({"qk_norm": True}, "qk_norm"),
        ({"pool": "gap", "pool_norm": True}, "pool_norm"),
        ({"head": "mlp"}, "head mlp"),
        ({"position": "rotary"}, "position rotary"),
        ({"position_at": "every"}, "position_at every"),
        ({"activation": "swiglu"}, "swiglu without layer_scale"),
        ({"layer_scale": 1.0, "mlp_width": 40, "pool": "token+gap"}, "1.25 times"),
        ({"pool": "gap", "image_size": (16, 8)}, "image_size that is not square"),
        ({"pool": "gap", "patch_size": (8, 4)}, "patch_size that is not square"),
    ],
)
def test_what_no_class_can_hold_is_refused(options: dict[str, Any], reason: str) -> None:
    values: dict[str, Any] = {"patch_size": (8, 8), "image_size": (16, 16), "num_classes": 3}
    values |= {"depth": 1, "width": 32, "heads": 2, "mlp_width": 64} | options
    with pytest.raises(PatchwordError, match=rf"transformers has no .*{reason}"):
        huggingface.write(build_model(ViTSpec(**values)))


@pytest.mark.parametrize("name", ["Mixer-S/16", "BiT-R50x1", "R50+ViT-B/16"])
def test_other_families_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, 3, 224)
    with pytest.raises(PatchwordError, match=r"transformers has no (place for a|stem)"):
        huggingface.write(model)


# Preprocessing -----------------------------------------------------------------------------------

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("given", "wanted", "note"),
    [
        (
            {"size": {"height": 24, "width": 24}, "resample": 2, "image_mean": HALF},
            {"interpolation": "bilinear", "resize": "stretch", "mean": (0.5, 0.5, 0.5)},
            "",
        ),
        ({"size": 24, "resample": 3}, {"interpolation": "bicubic", "resize": "stretch"}, ""),
        (
            {"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}}
            | {"do_center_crop": True},
            {"resize": "short", "crop_fraction": 0.75},
            "",
        ),
        (
            {"size": 32, "crop_size": 24, "do_center_crop": True},
            {"resize": "short", "crop_fraction": 0.75},
            "squeezes",
        ),
        (
            {"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True},
            {"resize": "short", "crop_fraction": 0.875},
            "image_size=224",
        ),
        (
            {"size": 32, "image_processor_type": "BitImageProcessor"},
            {"resize": "short", "crop_fraction": 1.0},
            "32x32",
        ),
        ({"resample": 1}, {"interpolation": "bilinear"}, "resampling 1"),
        ({"do_normalize": False}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}, ""),
        (
            {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51, 51, 51]},
            {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)},
            "",
        ),
        ({"image_mean": 0.25}, {"mean": (0.25, 0.25, 0.25)}, ""),
    ],
)
def test_preprocessing_is_read(given: dict[str, Any], wanted: dict[str, Any], note: str) -> None:
    theirs = build("vit")
    config = theirs.config.to_dict() | {"preprocessor": given}
    found, _ = read(theirs.state_dict(), config)
    assert vars(found.preprocess).items() >= wanted.items()
    assert (note in " ".join(found.notes)) if note else not found.notes


@pytest.mark.parametrize(
    ("case", "resize", "mean"),
    [("vit", "stretch", 0.5), ("dinov2", "short", 0.485), ("siglip", "stretch", 0.5)],
)
def test_without_a_processor_that_of_the_kind_holds(case: str, resize: str, mean: float) -> None:
    theirs = build(case)
    found, _ = read(theirs.state_dict(), theirs.config.to_dict())
    assert (found.preprocess.resize, found.preprocess.mean[0]) == (resize, mean)
    assert any("preprocessor" in note for note in found.notes)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize", ["stretch", "short"])
def test_their_processor_makes_the_same_pixels(
    resize: Any, interpolation: Any, tmp_path: Path
) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    spec = PreprocessSpec(
        mean=mean, std=std, interpolation=interpolation, resize=resize, crop_fraction=0.75
    )
    model = create_model("ViT-Ti/8", 2, 24, depth=1, preprocess=spec)
    folder = save(huggingface.write(model), tmp_path)
    kind = json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"]
    processor = getattr(transformers, f"{kind}Pil").from_pretrained(folder)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    pixels = torch.from_numpy(EvalTransform((24, 24), 3, spec)(image)).float() / 255
    ours = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    inner = slice(2, -2) if resize == "short" else slice(None)  # ours sees nothing past the cut
    level = 1 / 255 / min(std)
    assert (ours - theirs)[:, inner, inner].abs().max() <= level * 1.01
