"""Train, transfer, study and ship Vision Transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchword.commands.evaluating import Evaluation, evaluate
    from patchword.commands.predicting import predict
    from patchword.evaluation.classify import Classification
    from patchword.models.model import Model
    from patchword.models.position import resample_position_embedding
    from patchword.models.vit import ViT
    from patchword.models.zoo import create_model, list_models
    from patchword.run.train import TrainResult, train
    from patchword.session.session import Prediction, Session
    from patchword.spec.model import ViTSpec
    from patchword.spec.parse import PatchwordError, UsageError
    from patchword.spec.train import TrainSpec
    from patchword.weights.load import load_model
    from patchword.weights.save import save_model

__version__ = "0.1.0"

_HOMES = {
    "create_model": "models.zoo",
    "list_models": "models.zoo",
    "resample_position_embedding": "models.position",
    "Model": "models.model",
    "ViT": "models.vit",
    "ViTSpec": "spec.model",
    "TrainSpec": "spec.train",
    "PatchwordError": "spec.parse",
    "UsageError": "spec.parse",
    "load_model": "weights.load",
    "save_model": "weights.save",
    "train": "run.train",
    "TrainResult": "run.train",
    "evaluate": "commands.evaluating",
    "predict": "commands.predicting",
    "Prediction": "session.session",
    "Session": "session.session",
    "Evaluation": "commands.evaluating",
    "Classification": "evaluation.classify",
}

__all__ = [
    "Classification",
    "Evaluation",
    "Model",
    "PatchwordError",
    "Prediction",
    "Session",
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
