"""Hugging Face transformers: ViT, DeiT, DINOv2 with and without registers, the encoder of ViT-MAE,
and SigLIP's vision tower."""

from patchword.weights.huggingface.reading import find, recognises
from patchword.weights.huggingface.writing import write

__all__ = ["find", "recognises", "write"]
