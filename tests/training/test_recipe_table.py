"""Every recipe's values against a table that was read from the publications, not from the code.

Tables 3 and 4 and section B.1.2 of the ViT paper (arXiv 2010.11929); MAE (arXiv 2111.06377), tables
8 and 9; big_vision's configs vit_i1k (AugReg, arXiv 2106.10270) and vit_s16_i1k (arXiv 2205.01580),
whose weight decay of 1e-4 is the product with the learning rate of 1e-3. Of recipes of our own the
table holds what they are documented to be.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest

from patchword.models.zoo import model_spec
from patchword.training.recipes import RECIPES, recipe_spec


@dataclass(frozen=True)
class Row:
    """What a recipe sets; the defaults stand for "none of it"."""

    length: str
    batch: int
    lr: float
    model: str = ""
    """empty where --init brings it"""
    size: tuple[int, int] | None = (224, 224)
    """None where --init brings it"""
    objective: str = "classification"
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup: float = 10_000
    """steps, below 1 a share of the run"""
    weight_decay: float = 0.0
    clip: float = 1.0
    loss: str = "softmax"
    smoothing: float = 0.0
    layer_decay: float = 1.0
    average: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.0
    head: str = "linear"
    pool: str = "token"
    position: str = "learned-1d"
    crop: str = "inception"
    crop_area: tuple[float, float] = (0.05, 1.0)
    flip: bool = True
    pad: int = 0
    affine: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """rotate, scale, translate, shear"""
    randaugment: tuple[int, float] = (0, 0.0)
    """layers and magnitude"""
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0
    preprocess: tuple[Any, ...] = (None, None, None)
    """interpolation, resize and crop fraction; None for those of the weights, or the usual ones"""
    held_out: tuple[float, float] = (0.1, 0.1)
    """val and test"""
    rates: tuple[float, ...] = ()
    """tried before the run"""
    swept: tuple[float, ...] = ()
    """of table 4"""
    tuning: tuple[Any, ...] = ("all",)
    probe: bool = False
    enlarge: float = 1.0
    masking: tuple[Any, ...] = ()
    """share masked, what is predicted, and the decoder's depth, width and heads"""


Fields = dict[str, Any]


def but(fields: Fields, **changed: Any) -> Fields:
    """The fields with some others."""
    return fields | changed


WHOLE: Fields = {"held_out": (0.01, 0.0), "preprocess": ("bilinear", None, None)}
MLP: Fields = {"head": "mlp"}
JFT: Fields = WHOLE | {
    "schedule": "linear",
    "weight_decay": 0.1,
    "clip": 0.0,
    "loss": "sigmoid",
}
I21K: Fields = JFT | MLP | {"weight_decay": 0.03, "dropout": 0.1}
I1K: Fields = WHOLE | MLP | {"weight_decay": 0.3, "dropout": 0.1}
PLAIN: Fields = WHOLE | MLP | {"weight_decay": 0.1, "pool": "gap", "position": "sincos2d"}
PLAIN |= {"randaugment": (2, 10.0), "mixup": 0.2}
AUGREG: Fields = WHOLE | MLP | {"weight_decay": 0.1, "loss": "sigmoid"}
SGD: Fields = {"size": (384, 384), "optimizer": "sgd", "warmup": 500}
SGD |= {"preprocess": ("bilinear", "stretch", None)}
SMALL_RATES = (0.001, 0.003, 0.01, 0.03)
LARGE_RATES = (0.003, 0.01, 0.03, 0.06)
MASKED: Fields = WHOLE | {"model": "ViT-B/16", "objective": "masked-patch", "clip": 0.0}
MASKED |= {"masking": (0.5, "mean", 8, 512, 16)}
UNSEEN = (None, "mean", 8, 512, 16)
SMALL_DECODER = (None, "mean", 2, 96, 3)
CIFAR: Fields = {
    "model": "ViT-Ti/4",
    "size": (32, 32),
    "pool": "gap",
    "crop": "resize",
    "pad": 4,
}
CIFAR |= {
    "preprocess": (None, None, 1.0),
    "held_out": (0.04, 0.1),
    "warmup": 0.1,
    "weight_decay": 0.05,
}
PHOTOS: Fields = {
    "model": "ViT-Ti/16",
    "pool": "gap",
    "position": "sincos2d",
    "warmup": 0.1,
}
PHOTOS |= {"weight_decay": 0.05, "crop_area": (0.2, 1.0)}
KEPT = (None, "short", 0.875)
INIT: Fields = {"size": None, "warmup": 0.1}

TABLE: dict[str, Row] = {
    # table 3
    "imagenet-b16": Row("300 epochs", 4096, 3e-3, "ViT-B/16", **I1K),
    "imagenet-b32": Row("300 epochs", 4096, 3e-3, "ViT-B/32", **I1K),
    "imagenet-l16": Row("300 epochs", 4096, 3e-3, "ViT-L/16", **I1K),
    "imagenet-l32": Row("300 epochs", 4096, 3e-3, "ViT-L/32", **I1K),
    "imagenet21k-b16": Row("90 epochs", 4096, 1e-3, "ViT-B/16", **I21K),
    "imagenet21k-b32": Row("90 epochs", 4096, 1e-3, "ViT-B/32", **I21K),
    "imagenet21k-l16-30": Row("30 epochs", 4096, 1e-3, "ViT-L/16", **I21K),
    "imagenet21k-l16-90": Row("90 epochs", 4096, 1e-3, "ViT-L/16", **I21K),
    "imagenet21k-l32-30": Row("30 epochs", 4096, 1e-3, "ViT-L/32", **I21K),
    "imagenet21k-l32-90": Row("90 epochs", 4096, 1e-3, "ViT-L/32", **I21K),
    "jft-b16": Row("7 epochs", 4096, 8e-4, "ViT-B/16", **JFT | MLP),
    "jft-b32": Row("7 epochs", 4096, 8e-4, "ViT-B/32", **JFT | MLP),
    "jft-l32": Row("7 epochs", 4096, 6e-4, "ViT-L/32", **JFT | MLP),
    "jft-l16-7": Row("7 epochs", 4096, 4e-4, "ViT-L/16", **JFT | MLP),
    "jft-l16-14": Row("14 epochs", 4096, 4e-4, "ViT-L/16", **JFT | MLP),
    "jft-h14": Row("14 epochs", 4096, 3e-4, "ViT-H/14", **JFT | MLP),
    "jft-r50x1": Row("7 epochs", 4096, 1e-3, "BiT-R50x1", **JFT),
    "jft-r50x2": Row("7 epochs", 4096, 1e-3, "BiT-R50x2", **JFT),
    "jft-r101x1": Row("7 epochs", 4096, 8e-4, "BiT-R101x1", **JFT),
    "jft-r152x1": Row("7 epochs", 4096, 6e-4, "BiT-R152x1", **JFT),
    "jft-r152x2": Row("7 epochs", 4096, 6e-4, "BiT-R152x2", **JFT),
    "jft-r50-b16": Row("7 epochs", 4096, 8e-4, "R50+ViT-B/16", **JFT | MLP),
    "jft-r50-b32": Row("7 epochs", 4096, 8e-4, "R50+ViT-B/32", **JFT | MLP),
    "jft-r50-l32": Row("7 epochs", 4096, 2e-4, "R50+ViT-L/32", **JFT | MLP),
    "jft-r50-l16-7": Row("7 epochs", 4096, 4e-4, "R50+ViT-L/16", **JFT | MLP),
    "jft-r50-l16-14": Row("14 epochs", 4096, 4e-4, "R50+ViT-L/16", **JFT | MLP),
    # big_vision's configs
    "plain-s16-90": Row("90 epochs", 1024, 1e-3, "ViT-S/16", **PLAIN),
    "plain-s16-300": Row("300 epochs", 1024, 1e-3, "ViT-S/16", **PLAIN),
    "augreg-light": Row(
        "300 epochs", 4096, 1e-3, "ViT-S/16", **AUGREG, randaugment=(2, 10.0), mixup=0.2
    ),
    "augreg-medium": Row(
        "300 epochs", 4096, 1e-3, "ViT-S/16", **AUGREG, randaugment=(2, 15.0), mixup=0.5
    ),
    "augreg-strong": Row(
        "300 epochs", 4096, 1e-3, "ViT-S/16", **AUGREG, randaugment=(2, 20.0), mixup=0.8
    ),
    # table 4; table 2 for 512 px
    "finetune": Row("20000 steps", 512, 0.03, **SGD, held_out=(0.01, 0.1), swept=LARGE_RATES),
    "finetune-512": Row(
        *("20000 steps", 512, 0.03),
        **but(SGD, size=(512, 512)),
        held_out=(0.01, 0.1),
        swept=LARGE_RATES,
        average=0.9999,
    ),
    "finetune-cifar": Row("10000 steps", 512, 0.01, **SGD, held_out=(0.02, 0.1), swept=SMALL_RATES),
    "finetune-small": Row(
        "500 steps", 512, 0.01, **but(SGD, warmup=100), held_out=(0.1, 0.1), swept=SMALL_RATES
    ),
    "finetune-vtab": Row("2500 steps", 512, 0.01, **SGD, held_out=(0.2, 0.1), swept=(0.01,)),
    # section B.1.2; MAE, tables 8 and 9
    "masked-patch": Row("1000000 steps", 4096, 2e-4, **MASKED),
    "masked-patch-100k": Row("100000 steps", 4096, 2e-4, **MASKED),
    "mae": Row(
        *("1600 epochs", 4096, 2.4e-3, "ViT-B/16"),
        held_out=(0.01, 0.0),
        objective="mae",
        betas=(0.9, 0.95),
        weight_decay=0.05,
        warmup=40 / 1600,
        clip=0.0,
        position="sincos2d",
        crop_area=(0.2, 1.0),
        masking=(0.75, "mean", 8, 512, 16),
    ),
    "finetune-adamw": Row(
        *("50 epochs", 128, 5e-4),
        **but(INIT, warmup=0.05),
        weight_decay=0.05,
        layer_decay=0.75,
        smoothing=0.1,
        average=0.9999,
        drop_path=0.1,
        crop_area=(0.08, 1.0),
        randaugment=(2, 9.0),
        mixup=0.8,
        cutmix=1.0,
        erasing=0.25,
    ),
    # ours
    "transfer": Row(
        *("20 epochs", 32, 1e-4),
        **INIT,
        weight_decay=0.05,
        average=0.9999,
        rates=(3e-5, 1e-4),
        preprocess=KEPT,
        crop_area=(0.25, 1.0),
        probe=True,
        enlarge=1.29,
    ),
    "head": Row(
        *("0 steps", 64, 1e-3),
        size=None,
        warmup=0.05,
        weight_decay=0.05,
        preprocess=KEPT,
        probe=True,
    ),
    "lora": Row(
        "20 epochs", 64, 1e-3, **INIT, crop_area=(0.2, 1.0), probe=True, tuning=("lora", 8, 16.0)
    ),
    "last-k": Row(
        *("20 epochs", 64, 5e-4),
        **INIT,
        weight_decay=0.05,
        crop_area=(0.2, 1.0),
        probe=True,
        tuning=("last", 2),
    ),
    "photos": Row(
        *("100 epochs", 64, 1e-3),
        **PHOTOS,
        drop_path=0.05,
        randaugment=(2, 10.0),
        mixup=0.2,
    ),
    "photos-masked-patch": Row(
        *("200 epochs", 64, 5e-4),
        **PHOTOS,
        objective="masked-patch",
        betas=(0.9, 0.95),
        masking=UNSEEN,
    ),
    "photos-mae": Row(
        "200 epochs", 64, 5e-4, **PHOTOS, objective="mae", betas=(0.9, 0.95), masking=SMALL_DECODER
    ),
    "digits": Row(
        *("2200 steps", 128, 2e-3, "ViT-Ti/4", (16, 16)),
        warmup=0.05,
        weight_decay=0.05,
        average=0.99,
        drop_path=0.1,
        pool="gap",
        crop="resize",
        flip=False,
        preprocess=("bilinear", None, 1.0),
        affine=(10.0, 0.1, 0.08, 5.0),
    ),
    "cifar10": Row("100 epochs", 128, 1e-3, **CIFAR, average=0.999),
    "cifar10-small": Row("time 30m", 128, 2e-3, **but(CIFAR, weight_decay=0.1), average=0.998),
    "cifar-masked-patch": Row(
        *("time 20m", 128, 1e-3),
        **CIFAR,
        objective="masked-patch",
        betas=(0.9, 0.95),
        masking=UNSEEN,
    ),
    "cifar-mae": Row(
        *("time 20m", 128, 1e-3),
        **CIFAR,
        objective="mae",
        betas=(0.9, 0.95),
        position="sincos2d",
        masking=SMALL_DECODER,
    ),
}


def row_of(name: str) -> Row:
    """The recipe as the code has it."""
    spec, recipe = recipe_spec(name, "x"), RECIPES[name]
    optim, augment, cut, pretrain = spec.optim, spec.augment, spec.preprocess, spec.pretrain
    model = vars(model_spec(spec.model or "ViT-Ti/16", **spec.options.given()))
    lengths = {"steps": spec.steps, "epochs": spec.epochs, "images": spec.images}
    length = next((f"{value:g} {unit}" for unit, value in lengths.items() if value is not None), "")
    if spec.steps is not None:
        length = f"{spec.steps} steps"
    tuning = {
        "all": (),
        "last": (spec.tuning.last_blocks,),
        "lora": (spec.tuning.lora_rank, spec.tuning.lora_alpha),
    }
    decoder = (pretrain.decoder_depth, pretrain.decoder_width, pretrain.decoder_heads)
    return Row(
        length=length or f"time {spec.time}",
        batch=spec.batch_size,
        lr=optim.lr,
        model=spec.model or "",
        size=None if spec.model is None and spec.image_size is None else spec.size,
        objective=spec.objective,
        optimizer=optim.optimizer,
        betas=(optim.beta1, optim.beta2),
        momentum=optim.momentum,
        schedule=optim.schedule,
        warmup=optim.warmup,
        weight_decay=optim.weight_decay,
        clip=optim.clip,
        loss=optim.loss,
        smoothing=optim.label_smoothing,
        layer_decay=optim.layer_decay,
        average=optim.average,
        dropout=model.get("dropout", 0.0),
        drop_path=model.get("drop_path", 0.0),
        head=model.get("head", "linear"),
        pool=model.get("pool", "token"),
        position=model.get("position", "learned-1d"),
        crop=augment.crop,
        crop_area=augment.crop_area,
        flip=augment.flip,
        pad=augment.pad,
        affine=(augment.rotate, augment.scale, augment.translate, augment.shear),
        randaugment=(augment.randaugment_layers, augment.randaugment_magnitude),
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        erasing=augment.erasing,
        preprocess=(cut.interpolation, cut.resize, cut.crop_fraction),
        held_out=(spec.data.val_fraction, spec.data.test_fraction),
        rates=optim.rates,
        swept=recipe.rates,
        tuning=(spec.tuning.tune, *tuning[spec.tuning.tune]),
        probe=spec.probe,
        enlarge=spec.enlarge,
        masking=(pretrain.mask_rate, pretrain.predict, *decoder) if spec.self_supervised else (),
    )


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_is_what_its_source_says(name: str):
    """A recipe that the table lacks fails too: add its row, from its source."""
    found, wanted = row_of(name), TABLE[name]
    differing = {
        field.name: (getattr(found, field.name), getattr(wanted, field.name))
        for field in fields(Row)
        if getattr(found, field.name) != getattr(wanted, field.name)
    }
    assert differing == {}


def test_no_row_without_a_recipe():
    assert TABLE.keys() == RECIPES.keys()


SHAPES: dict[str, dict[str, int]] = {
    "digits": {"depth": 4, "width": 64, "mlp_width": 256, "heads": 4},
    "cifar10": {"depth": 9, "width": 192, "mlp_width": 768, "heads": 3},
    "cifar10-small": {"depth": 6, "width": 128, "mlp_width": 512, "heads": 4},
    "cifar-masked-patch": {"depth": 6, "width": 128, "mlp_width": 512, "heads": 4},
    "cifar-mae": {"depth": 6, "width": 128, "mlp_width": 512, "heads": 4},
}


@pytest.mark.parametrize("name", RECIPES)
def test_only_small_recipes_change_the_shape(name: str):
    spec = recipe_spec(name, "x")
    model = vars(model_spec(spec.model or "ViT-Ti/16", **spec.options.given()))
    if name in SHAPES:
        assert {key: model[key] for key in SHAPES[name]} == SHAPES[name]
    else:
        assert not {"depth", "width", "mlp_width", "heads"} & spec.options.given().keys()


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_else_departs_from_the_ordinary(name: str):
    """What no recipe uses, so that a row needs no column for it."""
    spec = recipe_spec(name, "x")
    optim = spec.optim
    assert (optim.cooldown, optim.final_lr, optim.decay_all, optim.parts) == (0, 0, False, 1)
    assert (spec.data.balance, spec.data.train_images, spec.seed) == ("none", None, 0)
    assert spec.augment.crop_aspect == (0.75, 4 / 3)
    unused = ("layer_scale", "registers", "qk_norm", "activation", "patch_dropout", "distillation")
    assert not {*unused, "position_at"} & spec.options.given().keys()
