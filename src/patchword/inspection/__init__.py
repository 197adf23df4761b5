"""What a model has learned, as arrays; the modules named `figures` draw them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchword.inspection.attention import (
        attention_distance,
        attention_entropy,
        attention_maps,
        rollout,
    )
    from patchword.inspection.embedding import embedding_filters, position_similarity
    from patchword.inspection.explain import explain_class, gradient_rollout
    from patchword.inspection.removal import occlusion
    from patchword.inspection.tokens import token_components

_HOMES = {
    "attention_distance": "attention",
    "attention_entropy": "attention",
    "attention_maps": "attention",
    "rollout": "attention",
    "embedding_filters": "embedding",
    "position_similarity": "embedding",
    "explain_class": "explain",
    "gradient_rollout": "explain",
    "occlusion": "removal",
    "token_components": "tokens",
}

__all__ = [
    "attention_distance",
    "attention_entropy",
    "attention_maps",
    "embedding_filters",
    "explain_class",
    "gradient_rollout",
    "occlusion",
    "position_similarity",
    "rollout",
    "token_components",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
