"""Named recipes: where each comes from, what it should reach, and the settings it stands for.

Standard library only, so that help needs no torch. Sections and tables are those of the ViT paper
(arXiv 2010.11929). Table 3 gives neither the loss nor the cropping: sigmoid cross-entropy on JFT
and ImageNet-21k, Inception crops and bilinear resizing are what the authors' public code
(big_vision) has. With the sigmoid loss a fresh head's bias is -log K, -6.9 for ImageNet's classes
(`run.inputs.build_model`). Where ImageNet or JFT come undivided, 1 % is held out to choose the
best weights. Recipes that start from weights are in `transfer_recipes`, those without labels in
`pretrain_recipes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from patchword.spec.parse import UsageError, nearest, parse, to_dict
from patchword.spec.train import ModelOptions, TrainSpec
from patchword.training.recipes.pretraining import PRETRAIN
from patchword.training.recipes.transfer import BILINEAR, IMAGENET, TRANSFER

IMAGENET21K, JFT = 14_197_122, 303_000_000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings by name."""

    name: str
    title: str
    source: str
    """the publication and table the settings come from"""
    expected: str
    """the result to expect, and who measured it"""
    images: int | None
    """training images of the data it is for, None for any"""
    settings: dict[str, Any]
    """a partial TrainSpec, as JSON"""
    rates: tuple[float, ...] = ()
    """learning rates that the publication sweeps, rising; empty if it has one"""
    held_out: float | None = None
    """share of the train part on which it chooses among them"""

    @property
    def command(self) -> str:
        """The command that runs it."""
        data = "digits" if self.name == "digits" else "DATA"
        init = "" if "model" in self.settings else " --init WEIGHTS"
        return f"patchword train {data} --recipe {self.name}{init}"


RECIPES: dict[str, Recipe] = {}


def _add(name: str, title: str, **fields: Any) -> None:
    RECIPES[name] = Recipe(name=name, title=title, **fields)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, group by group."""
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(cast("Mapping[str, Any]", inner), cast("Mapping[str, Any]", value))
        else:
            merged[key] = value
    return merged


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises `UsageError` naming the nearest ones."""
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}{nearest(name, RECIPES)}")
    return RECIPES[name]


def recipe_spec(name: str, source: str) -> TrainSpec:
    """The recipe's settings for `source`; what it leaves open has `TrainSpec`'s defaults."""
    values = to_dict(TrainSpec(source=source, recipe=name))
    return parse(TrainSpec, merge(values, find_recipe(name).settings))


def base_spec(
    source: str,
    recipe: str | None = None,
    init: str | None = None,
    objective: str | None = None,
) -> TrainSpec:
    """The settings that flags are laid over: those of `recipe`, by default `digits` for digits,
    `transfer` with weights to start from, and else `photos`. Without labels those of
    `photos-masked-patch` or `photos-mae`: for digits only what is masked and predicted, and with
    weights to start from all but the model."""
    usual = "digits" if source == "digits" else "photos"
    if recipe is not None or f"photos-{objective}" not in RECIPES:
        return recipe_spec(recipe or ("transfer" if init else usual), source)
    spec = recipe_spec(f"photos-{objective}", source)
    if init:
        return replace(spec, model=None, options=ModelOptions())
    if source == "digits":
        known = recipe_spec("digits", source)
        return replace(known, objective=spec.objective, pretrain=spec.pretrain)
    return spec


# For a folder of photos -------------------------------------------------------------------------

_add(
    "photos",
    "a classifier from scratch on a folder of photos",
    source="AugReg's medium settings (arXiv 2106.10270) scaled down",
    expected="poor on a few thousand photos, as section 4.3 says of small data: prefer --init",
    images=None,
    settings={
        "model": "ViT-Ti/16",
        "epochs": 100.0,
        "batch_size": 64,
        "options": {"pool": "gap", "position": "sincos2d", "drop_path": 0.05},
        "augment": {
            "crop_area": [0.2, 1.0],
            "randaugment_layers": 2,
            "randaugment_magnitude": 10.0,
            "mixup": 0.2,
        },
        "optim": {"lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1},
    },
)

# Small built-in and benchmark data ---------------------------------------------------------------

_add(
    "digits",
    "scikit-learn's handwritten digits, 8 px enlarged to 16",
    source="ours; `patchword demo` runs it",
    expected="98.9 % on average over five seeds (docs/results.md)",
    images=1_366,
    settings={
        "model": "ViT-Ti/4",
        "image_size": [16],  # enlarged first: at 8 px the affine maps would blur the strokes away
        "steps": 2200,
        "batch_size": 128,
        "eval_every": 2200,  # 72 images are too few to choose among weights
        "options": {
            "depth": 4,
            "width": 64,
            "mlp_width": 256,
            "heads": 4,
            "pool": "gap",
            "drop_path": 0.1,
        },
        "preprocess": {"interpolation": "bilinear", "crop_fraction": 1.0},
        "augment": {
            "crop": "resize",
            "flip": False,
            "rotate": 10.0,
            "scale": 0.1,
            "translate": 0.08,
            "shear": 5.0,
        },
        "optim": {"lr": 2e-3, "weight_decay": 0.05, "average": 0.99},
    },
)
_add(
    "cifar10",
    "CIFAR-10 from scratch, 32 px",
    source="ours, after section 2's remark on small patches for small images",
    expected="see docs/results.md",
    images=50_000,
    settings={
        "model": "ViT-Ti/4",
        "image_size": [32],
        "epochs": 100.0,
        "batch_size": 128,
        "data": {"val_fraction": 0.04},
        "options": {"depth": 9, "pool": "gap"},
        "preprocess": {"crop_fraction": 1.0},
        "augment": {"crop": "resize", "pad": 4},
        "optim": {"lr": 1e-3, "weight_decay": 0.05, "average": 0.999, "warmup": 0.1},
    },
)

_add(
    "cifar10-small",
    "CIFAR-10 from scratch on a laptop's CPU, half an hour or so",
    source="ours: a smaller model, because at two cores epochs count for more than size",
    expected="see docs/results.md",
    images=50_000,
    settings=merge(
        RECIPES["cifar10"].settings,
        {
            "time": "30m",
            "epochs": None,
            "options": {"depth": 6, "width": 128, "mlp_width": 512, "heads": 4},
            "optim": {"lr": 2e-3, "average": 0.998, "weight_decay": 0.1},
        },
    ),
)

# Table 3: pre-training ----------------------------------------------------------------------------


WHOLE = {"val_fraction": 0.01, "test_fraction": 0.0}


def _table3(
    name: str, data: str, images: int, model: str, epochs: float, expected: str, **settings: Any
) -> None:
    _add(
        name,
        f"{model} on {data}, {epochs:.0f} epochs",
        source="table 3",
        expected=expected,
        images=images,
        settings=merge(
            {
                "model": model,
                "epochs": float(epochs),
                "batch_size": 4096,
                "options": {} if model.startswith("BiT") else {"head": "mlp"},
                "data": WHOLE,
                "preprocess": BILINEAR,
                "optim": {"warmup": 10_000.0, "beta2": 0.999, "clip": 0.0},
            },
            settings,
        ),
    )


def _short(model: str) -> str:
    """`b16` of `ViT-B/16`, `r50-b16` of `R50+ViT-B/16`, `r50x1` of `BiT-R50x1`."""
    bare = model.replace("+ViT", "").removeprefix("ViT-").removeprefix("BiT-")
    return bare.replace("/", "").lower()


for _model, _expected in {
    "ViT-B/16": "77.91 % top-1 after fine-tuning at 384 px (table 5)",
    "ViT-B/32": "73.38 % top-1 after fine-tuning at 384 px (table 5)",
    "ViT-L/16": "76.53 % top-1 after fine-tuning at 384 px (table 5)",
    "ViT-L/32": "71.16 % top-1 after fine-tuning at 384 px (table 5)",
}.items():
    _table3(
        f"imagenet-{_short(_model)}",
        "ImageNet",
        IMAGENET,
        _model,
        300,
        _expected,
        options={"dropout": 0.1},
        optim={"lr": 3e-3, "weight_decay": 0.3, "schedule": "cosine", "clip": 1.0},
    )
for _model, _epochs, _expected in (
    ("ViT-B/16", 90, "83.97 % ImageNet top-1 after fine-tuning at 384 px (table 5)"),
    ("ViT-B/32", 90, "81.28 % ImageNet top-1 after fine-tuning at 384 px (table 5)"),
    ("ViT-L/16", 30, "the paper lists this length, but no figure of its own for it"),
    ("ViT-L/16", 90, "85.15 % ImageNet top-1 after fine-tuning at 384 px (table 5)"),
    ("ViT-L/32", 30, "the paper lists this length, but no figure of its own for it"),
    ("ViT-L/32", 90, "80.99 % ImageNet top-1 after fine-tuning at 384 px (table 5)"),
):
    _table3(
        f"imagenet21k-{_short(_model)}" + (f"-{_epochs}" if "L" in _model else ""),
        "ImageNet-21k",
        IMAGENET21K,
        _model,
        _epochs,
        _expected,
        options={"dropout": 0.1},
        optim={"lr": 1e-3, "weight_decay": 0.03, "schedule": "linear", "loss": "sigmoid"},
    )
for _model, _epochs, _lr, _score in (
    ("ViT-B/16", 7, 8e-4, 84.15),
    ("ViT-B/32", 7, 8e-4, 80.73),
    ("ViT-L/32", 7, 6e-4, 84.37),
    ("ViT-L/16", 7, 4e-4, 86.30),
    ("ViT-L/16", 14, 4e-4, 87.12),
    ("ViT-H/14", 14, 3e-4, 88.08),
    ("BiT-R50x1", 7, 1e-3, 77.54),
    ("BiT-R50x2", 7, 1e-3, 82.12),
    ("BiT-R101x1", 7, 8e-4, 80.67),
    ("BiT-R152x1", 7, 6e-4, 81.88),
    ("BiT-R152x2", 7, 6e-4, 84.97),
    ("R50+ViT-B/32", 7, 8e-4, 84.90),
    ("R50+ViT-B/16", 7, 8e-4, 85.58),
    ("R50+ViT-L/32", 7, 2e-4, 85.68),
    ("R50+ViT-L/16", 7, 4e-4, 86.60),
    ("R50+ViT-L/16", 14, 4e-4, 87.12),
):
    _table3(
        f"jft-{_short(_model)}" + (f"-{_epochs}" if _model.endswith("ViT-L/16") else ""),
        "JFT-300M",
        JFT,
        _model,
        _epochs,
        f"{_score:.2f} % ImageNet top-1 after fine-tuning at 384 px (table 6)",
        optim={"lr": _lr, "weight_decay": 0.1, "schedule": "linear", "loss": "sigmoid"},
    )

# Without labels ----------------------------------------------------------------------------------

for _name, _fields in PRETRAIN.items():
    _add(_name, **_fields)

# Transfer ----------------------------------------------------------------------------------------

for _name, _fields in TRANSFER.items():
    _add(_name, **_fields)

# Later recipes of the same authors ----------------------------------------------------------------

for _epochs, _score in ((90, 76.5), (300, 80.0)):
    _add(
        f"plain-s16-{_epochs}",
        f"ViT-S/16 on ImageNet, {_epochs} epochs",
        source='"Better plain ViT baselines" (arXiv 2205.01580), big_vision vit_s16_i1k',
        expected=f"{_score} % ImageNet top-1 at 224 px, by its authors",
        images=IMAGENET,
        settings={
            "model": "ViT-S/16",
            "epochs": float(_epochs),
            "batch_size": 1024,
            "data": WHOLE,
            "preprocess": BILINEAR,
            "options": {"pool": "gap", "position": "sincos2d", "head": "mlp"},
            "augment": {
                "randaugment_layers": 2,
                "randaugment_magnitude": 10.0,
                "mixup": 0.2,
            },
            "optim": {"lr": 1e-3, "weight_decay": 0.1, "warmup": 10_000.0},
        },
    )
for _name, _preset, _magnitude, _mixup in (
    ("light", "light2", 10.0, 0.2),
    ("medium", "medium2", 15.0, 0.5),
    ("strong", "strong2", 20.0, 0.8),
):
    _add(
        f"augreg-{_name}",
        f"ViT-S/16 on ImageNet, {_name} augmentation, 300 epochs",
        source=f'"How to train your ViT?" (arXiv 2106.10270), {_preset}; big_vision vit_i1k: '
        "sigmoid loss, no dropout, no stochastic depth",
        expected="figure 4 of that paper; the best strength depends on model and data",
        images=IMAGENET,
        settings={
            "model": "ViT-S/16",
            "epochs": 300.0,
            "batch_size": 4096,
            "data": WHOLE,
            "preprocess": BILINEAR,
            "options": {"head": "mlp"},
            "augment": {
                "randaugment_layers": 2,
                "randaugment_magnitude": _magnitude,
                "mixup": _mixup,
            },
            "optim": {
                "lr": 1e-3,
                "weight_decay": 0.1,
                "warmup": 10_000.0,
                "loss": "sigmoid",
            },
        },
    )
