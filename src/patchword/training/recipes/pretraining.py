"""Recipes that learn without labels: the fields of each by name; `recipes` makes them known.

Standard library only. Section B.1.2 of the ViT paper gives no weight decay for masked patch
prediction: there is none here. MAE's learning rate is 1.5e-4 for 256 images (arXiv 2111.06377,
table 8), in proportion to the batch.
"""

from __future__ import annotations

from typing import Any

IMAGENET, JFT = 1_281_167, 303_000_000
WHOLE = {"val_fraction": 0.01, "test_fraction": 0.0}


def _masked_patch(steps: int, expected: str) -> dict[str, Any]:
    return {
        "title": f"masked patch prediction with ViT-B/16 on JFT-300M, {steps:,} steps",
        "source": "sections 4.6 and B.1.2",
        "expected": expected,
        "images": JFT,
        "settings": {
            "model": "ViT-B/16",
            "objective": "masked-patch",
            "steps": steps,
            "batch_size": 4096,
            "data": WHOLE,
            "preprocess": {"interpolation": "bilinear"},
            "pretrain": {"mask_rate": 0.5, "predict": "mean"},
            "optim": {"lr": 2e-4, "warmup": 10_000.0, "weight_decay": 0.0, "clip": 0.0},
        },
    }


_CIFAR: dict[str, Any] = {
    "model": "ViT-Ti/4",
    "image_size": [32],
    "batch_size": 128,
    "time": "20m",
    "data": {"val_fraction": 0.04},
    "options": {"depth": 6, "width": 128, "mlp_width": 512, "heads": 4, "pool": "gap"},
    "preprocess": {"crop_fraction": 1.0},
    "augment": {"crop": "resize", "pad": 4},
    "optim": {"lr": 1e-3, "beta2": 0.95, "weight_decay": 0.05, "warmup": 0.1},
}
_PHOTOS: dict[str, Any] = {
    "model": "ViT-Ti/16",
    "epochs": 200.0,
    "batch_size": 64,
    "options": {"pool": "gap", "position": "sincos2d"},
    "augment": {"crop_area": [0.2, 1.0]},
    "optim": {"lr": 5e-4, "beta2": 0.95, "weight_decay": 0.05, "warmup": 0.1},
}
_SMALL_DECODER = {"decoder_depth": 2, "decoder_width": 96, "decoder_heads": 3}
_OURS = "ours: the objective of {} for a small model on a laptop's CPU"

PRETRAIN: dict[str, dict[str, Any]] = {
    "masked-patch": _masked_patch(
        1_000_000, "79.9 % ImageNet top-1 after fine-tuning (section 4.6)"
    ),
    "masked-patch-100k": _masked_patch(
        100_000, "nearly that of 1,000,000 steps: gains diminish beyond this (section B.1.2)"
    ),
    "mae": {
        "title": "masked autoencoder with ViT-B/16 on ImageNet, 1600 epochs",
        "source": "MAE (arXiv 2111.06377), table 8: learning rate 1.5e-4 for 256 images, warm-up "
        "of 40 epochs",
        "expected": "83.6 % ImageNet top-1 after fine-tuning, by its authors (table 3)",
        "images": IMAGENET,
        "settings": {
            "model": "ViT-B/16",
            "objective": "mae",
            "epochs": 1600.0,
            "batch_size": 4096,
            "data": WHOLE,
            "options": {"position": "sincos2d"},
            "augment": {"crop_area": [0.2, 1.0]},
            "pretrain": {
                "mask_rate": 0.75,
                "decoder_depth": 8,
                "decoder_width": 512,
                "decoder_heads": 16,
            },
            "optim": {
                "lr": 2.4e-3,
                "beta2": 0.95,
                "weight_decay": 0.05,
                "warmup": 0.025,
                "clip": 0.0,
            },
        },
    },
    "photos-masked-patch": {
        "title": "masked patch prediction on a folder of photos; what `--objective masked-patch` "
        "does",
        "source": "section B.1.2, scaled down",
        "expected": "features that fine-tune better than random weights; the more photos, the more",
        "images": None,
        "settings": _PHOTOS | {"objective": "masked-patch"},
    },
    "photos-mae": {
        "title": "masked autoencoder on a folder of photos; what `--objective mae` does",
        "source": "MAE (arXiv 2111.06377), scaled down",
        "expected": "features that fine-tune better than random weights; the more photos, the more",
        "images": None,
        "settings": _PHOTOS | {"objective": "mae", "pretrain": _SMALL_DECODER},
    },
    "cifar-masked-patch": {
        "title": "masked patch prediction on CIFAR-10 or other images of 32 px, 20 minutes",
        "source": _OURS.format("section B.1.2"),
        "expected": "see docs/self_supervision.md",
        "images": 50_000,
        "settings": _CIFAR | {"objective": "masked-patch"},
    },
    "cifar-mae": {
        "title": "masked autoencoder on CIFAR-10 or other images of 32 px, 20 minutes",
        "source": _OURS.format("MAE (arXiv 2111.06377)"),
        "expected": "see docs/self_supervision.md",
        "images": 50_000,
        "settings": _CIFAR
        | {
            "objective": "mae",
            "options": _CIFAR["options"] | {"position": "sincos2d"},
            "pretrain": _SMALL_DECODER,
        },
    },
}
