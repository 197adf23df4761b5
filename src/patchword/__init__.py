"""Train, transfer, study and ship Vision Transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchword.architecture import ViTSpec
    from patchword.evaluation.classify import Classification
    from patchword.models.model import Model
    from patchword.models.position import resample_position_embedding
    from patchword.models.vit import ViT
    from patchword.models.zoo import create_model, list_models
    from patchword.parsing import PatchwordError, UsageError
    from patchword.specs import TrainSpec
    from patchword.weights.loading import load_model
    from patchword.weights.saving import save_model
    from patchword.workflows.measuring import Evaluation, Prediction, evaluate, predict
    from patchword.workflows.training_run import TrainResult, train

__version__ = "0.1.0"

_HOMES = {
    "create_model": "models.zoo",
    "list_models": "models.zoo",
    "resample_position_embedding": "models.position",
    "Model": "models.model",
    "ViT": "models.vit",
    "ViTSpec": "architecture",
    "TrainSpec": "specs",
    "PatchwordError": "parsing",
    "UsageError": "parsing",
    "load_model": "weights.loading",
    "save_model": "weights.saving",
    "train": "workflows.training_run",
    "TrainResult": "workflows.training_run",
    "evaluate": "workflows.measuring",
    "predict": "workflows.measuring",
    "Prediction": "workflows.measuring",
    "Evaluation": "workflows.measuring",
    "Classification": "evaluation.classify",
}

__all__ = [
    "Classification",
    "Evaluation",
    "Model",
    "PatchwordError",
    "Prediction",
    "TrainResult",
    "TrainSpec",
    "UsageError",
    "ViT",
    "ViTSpec",
    "create_model",
    "evaluate",
    "list_models",
    "load_model",
    "predict",
    "resample_position_embedding",
    "save_model",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'patchword' has no attribute {name!r}")
    return getattr(importlib.import_module(f"patchword.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
