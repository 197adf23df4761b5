"""What a model has learned, as arrays; the modules of `figures` draw them."""

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
