"""Recipes that start from weights: the fields of each by name; `recipes` makes them known.

Standard library only. Table 4 gives neither the warm-up nor the cropping: 500 steps, Inception
crops and bilinear resizing straight to the square are what the authors' public code has.
"""

from __future__ import annotations

from typing import Any

IMAGENET = 1_281_167
BILINEAR = {"interpolation": "bilinear"}
SHAPE_KEPT = {"resize": "short", "crop_fraction": 0.875}
"""the middle of the photo, also for weights whose own images were stretched to a square"""
TRANSFER: dict[str, dict[str, Any]] = {
    "transfer": {
        "title": "fine-tuning on a folder of photos; what `train DATA --init WEIGHTS` does",
        "source": "ours: all weights by AdamW, if that betters a logistic regression on the "
        "frozen features",
        "expected": "at least the accuracy of a logistic regression on the frozen features",
        "images": None,
        "settings": {
            "probe": True,
            "enlarge": 1.29,  # 224 px to 288
            "epochs": 20.0,
            "batch_size": 32,
            "preprocess": SHAPE_KEPT,
            "augment": {"crop_area": [0.25, 1.0]},
            "optim": {
                "lr": 1e-4,
                "rates": [3e-5, 1e-4],  # short trials favour 3e-4, which is worse at full length
                "weight_decay": 0.05,
                "warmup": 0.1,
                "average": 0.9999,
            },
        },
    },
    "head": {
        "title": "a head on frozen features, which are computed once and kept on disk",
        "source": "ours: logistic regression, its regulariser chosen on the val part",
        "expected": "in a minute what the weights are worth as they are",
        "images": None,
        "settings": {"probe": True, "steps": 0, "batch_size": 64, "preprocess": SHAPE_KEPT},
    },
    "finetune-adamw": {
        "title": "fine-tuning all weights at length, strongly regularised",
        "source": "MAE (arXiv 2111.06377), table 9: learning rate 1e-3 for 256 images, layer-wise "
        "decay 0.75; here at batch 128, with a moving average besides",
        "expected": "for thousands of images and more; MAE's ViT-B/16 has 83.6 % ImageNet top-1",
        "images": None,
        "settings": {
            "epochs": 50.0,
            "batch_size": 128,
            "options": {"drop_path": 0.1},
            "augment": {
                "crop_area": [0.08, 1.0],
                "randaugment_layers": 2,
                "randaugment_magnitude": 9.0,
                "mixup": 0.8,
                "cutmix": 1.0,
                "erasing": 0.25,
            },
            "optim": {
                "lr": 5e-4,
                "layer_decay": 0.75,
                "weight_decay": 0.05,
                "warmup": 0.05,
                "label_smoothing": 0.1,
                "average": 0.9999,
            },
        },
    },
    "lora": {
        "title": "matrices of rank 8 added to those of every block, for large models",
        "source": "LoRA (arXiv 2106.09685); its settings ours",
        "expected": "about that of fine-tuning; the optimiser holds 1/18 (Ti/16) to 1/70 (B/16)",
        "images": None,
        "settings": {
            "probe": True,
            "epochs": 20.0,
            "batch_size": 64,
            "augment": {"crop_area": [0.2, 1.0]},
            "optim": {"lr": 1e-3, "weight_decay": 0.0, "warmup": 0.1},
            "tuning": {"tune": "lora", "lora_rank": 8, "lora_alpha": 16.0},
        },
    },
    "last-k": {
        "title": "the last two blocks and the head; no backward pass below them",
        "source": "partial fine-tuning as in MAE (arXiv 2111.06377, section 4.3), settings ours",
        "expected": "between a linear probe and fine-tuning; a step takes 0.4 of its time",
        "images": None,
        "settings": {
            "probe": True,
            "epochs": 20.0,
            "batch_size": 64,
            "augment": {"crop_area": [0.2, 1.0]},
            "optim": {"lr": 5e-4, "weight_decay": 0.05, "warmup": 0.1},
            "tuning": {"tune": "last", "last_blocks": 2},
        },
    },
}

# Table 4 -----------------------------------------------------------------------------------------

SMALL_RATES = (0.001, 0.003, 0.01, 0.03)
LARGE_RATES = (0.003, 0.01, 0.03, 0.06)
for _name, _data, _size, _steps, _warmup, _lr, _rates, _held_out, _expected in (
    ("", "ImageNet", 384, 20_000, 500, 0.03, LARGE_RATES, 0.01, "table 5"),
    (
        "-512",
        "ImageNet",
        512,
        20_000,
        500,
        0.03,
        LARGE_RATES,
        0.01,
        "table 2, which has H/14 at 518 px",
    ),
    ("-cifar", "CIFAR-10 or -100", 384, 10_000, 500, 0.01, SMALL_RATES, 0.02, "tables 2, 5"),
    ("-small", "Oxford Pets or Flowers", 384, 500, 100, 0.01, SMALL_RATES, 0.1, "tables 2, 5"),
    ("-vtab", "a VTAB-1k task", 384, 2_500, 500, 0.01, (0.01,), 0.2, "table 9"),
):
    TRANSFER[f"finetune{_name}"] = {
        "title": f"fine-tuning on {_data} at {_size} px, {_steps:,} steps of 512 images; "
        "--parts 8 where memory is short",
        "source": "table 4; warm-up of 500 steps from the authors' code, of 100 in the runs of "
        "500 steps ours",
        "expected": f"{_expected}, by the weights it starts from",
        "images": IMAGENET if _data == "ImageNet" else None,
        "rates": _rates,
        "held_out": _held_out,
        "settings": {
            "image_size": [_size],
            "steps": _steps,
            "batch_size": 512,
            "data": {"val_fraction": _held_out},
            "preprocess": BILINEAR | {"resize": "stretch"},
            "optim": {
                "optimizer": "sgd",
                "lr": _lr,
                "momentum": 0.9,
                "weight_decay": 0.0,
                "warmup": float(_warmup),
                "clip": 1.0,
                "average": 0.9999 if _size == 512 else 0.0,  # Polyak, for table 2 only
            },
        },
    }
