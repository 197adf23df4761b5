"""The same Vision Transformer, with the same weights, in the other libraries.

`build(library, model)` gives a module that takes float images `[B, C, H, W]` to logits `[B, K]` and
computes what `model` computes. Libraries are imported when they are asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from patchword.models.vit import ViT
from patchword.models.zoo import create_model
from patchword.spec.parse import PatchwordError, nearest, to_dict
from patchword.weights import huggingface, timm, torchvision
from timing import Options


def from_options(options: Options) -> ViT:
    """The patchword model of a benchmark, in evaluation mode. Its logits depend on all its weights:
    the head, the class token and the biases, zero at first, are drawn too."""
    changes = {key: value for key in ("depth", "width") if (value := getattr(options, key))}
    torch.manual_seed(options.seed)
    model = create_model(options.model, options.classes, options.image_size, **changes)
    if not isinstance(model, ViT):
        raise PatchwordError(f"{options.model} is no ViT; peers have the paper's plain ViT only")
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def define_torchvision_operators() -> None:
    """Let torchvision import next to a torch whose build its compiled operators do not match.

    It attaches shape functions to `nms` and `qnms` while importing and fails where they are not
    defined, and timm, transformers and vit-pytorch import it. No Vision Transformer calls them.
    """
    if "torchvision" in _LIBRARIES:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES["torchvision"] = library
        importlib.import_module("torchvision")


_LIBRARIES: dict[str, torch.library.Library] = {}  # a definition lasts as long as its object


class Logits(nn.Module):
    """A transformers model that returns its logits only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def _timm(model: ViT) -> nn.Module:
    written = timm.write(model)
    library = importlib.import_module("timm")
    peer = library.create_model(written.config["architecture"], **written.config["model_args"])
    peer.load_state_dict(written.tensors)
    return peer


def _torchvision(model: ViT) -> nn.Module:
    spec = model.spec
    module = importlib.import_module("torchvision.models.vision_transformer")
    peer = module.VisionTransformer(
        image_size=spec.image_size[0],
        patch_size=spec.patch_size[0],
        num_layers=spec.depth,
        num_heads=spec.heads,
        hidden_dim=spec.width,
        mlp_dim=spec.mlp_width,
        num_classes=spec.num_classes,
    )
    peer.load_state_dict(torchvision.write(model).tensors)
    return peer


def _transformers(model: ViT) -> nn.Module:
    written = huggingface.write(model)
    library = importlib.import_module("transformers")
    library.utils.logging.disable_progress_bar()
    config = library.ViTConfig(**written.config, attn_implementation="sdpa")
    peer = library.ViTForImageClassification.from_pretrained(
        None, config=config, state_dict=written.tensors
    )
    return Logits(peer)


def _vit_pytorch(model: ViT) -> nn.Module:
    spec = model.spec
    return importlib.import_module("vit_pytorch").ViT(
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        channels=spec.in_channels,
        num_classes=spec.num_classes,
        dim=spec.width,
        depth=spec.depth,
        heads=spec.heads,
        dim_head=spec.width // spec.heads,
        mlp_dim=spec.mlp_width,
    )


BUILDERS: dict[str, Callable[[ViT], nn.Module]] = {
    "timm": _timm,
    "transformers": _transformers,
    "torchvision": _torchvision,
    "vit-pytorch": _vit_pytorch,
}
SAME_WEIGHTS = ("timm", "transformers", "torchvision")


def installed() -> list[str]:
    """The libraries, of those in `BUILDERS`, that can be imported here."""
    return [name for name in BUILDERS if importlib.util.find_spec(name.replace("-", "_"))]


def build(library: str, model: ViT) -> nn.Module:
    """`model` in another library: same architecture, same number of parameters, same weights.

    vit-pytorch's model differs slightly (no qkv bias, two more LayerNorms at the patches): there
    the count, but for these, is checked, and the weights are its own. Raises `PatchwordError` for
    unknown libraries and for models that they do not have.
    """
    spec = model.spec
    if library not in BUILDERS:
        raise PatchwordError(f"unknown library {library!r}{nearest(library, BUILDERS)}")
    plain = spec.layer_scale is None and not (spec.registers or spec.qk_norm)
    if not (plain and spec.pool == "token" and spec.head == "linear"):
        raise PatchwordError("peers have the paper's plain ViT only: class token and linear head")
    define_torchvision_operators()
    peer = BUILDERS[library](model)
    extra = 0
    if library not in SAME_WEIGHTS:
        patch = spec.patch_size[0] * spec.patch_size[1] * spec.in_channels
        extra = 2 * patch + 2 * spec.width - 3 * spec.width * spec.depth
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (model, peer))
    if theirs != ours + extra:
        raise PatchwordError(f"{library} has {theirs:,} parameters, not {ours + extra:,}")
    return peer


@torch.inference_mode()
def difference(library: str, model: ViT, batch_size: int = 2) -> float:
    """Largest absolute difference of float32 logits, on standard normal images."""
    images = torch.randn(batch_size, model.spec.in_channels, *model.spec.image_size)
    return float((build(library, model).eval()(images) - model(images)).abs().max())


def describe(model: ViT) -> dict[str, Any]:
    """What the record of a benchmark says of the model: its spec, its size, and how far the logits
    of the libraries with its weights are from its own."""
    return {
        "spec": to_dict(model.spec),
        "parameters": sum(p.numel() for p in model.parameters()),
        "largest_logit_difference": {
            library: difference(library, model)
            for library in installed()
            if library in SAME_WEIGHTS
        },
    }
