"""The same Vision Transformer, with the same weights, in the other libraries.

`build(library, model)` gives a module that takes float images `[B, C, H, W]` to logits `[B, K]` and
computes what `model` computes. Libraries are imported when they are asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from patchword.architecture import ViTSpec
from patchword.models.vit import ViT
from patchword.models.zoo import create_model
from patchword.parsing import PatchwordError, nearest, to_dict
from timing import Options

# Parameter names of patchword to those of a library: regular expressions, applied in order.
NAMES: dict[str, list[tuple[str, str]]] = {
    "timm": [
        (r"^patch_embedding", "patch_embed.proj"),
        (r"^class_token", "cls_token"),
        (r"^position_embedding", "pos_embed"),
        (r"attention\.qkv", "attn.qkv"),
        (r"attention\.projection", "attn.proj"),
        (r"mlp\.hidden", "mlp.fc1"),
        (r"mlp\.output", "mlp.fc2"),
    ],
    "torchvision": [
        (r"^patch_embedding", "conv_proj"),
        (r"^position_embedding", "encoder.pos_embedding"),
        (r"^norm", "encoder.ln"),
        (r"^head", "heads.head"),
        (r"^blocks\.", "encoder.layers.encoder_layer_"),
        (r"\.norm([12])", r".ln_\1"),
        (r"attention\.qkv\.", "self_attention.in_proj_"),
        (r"attention\.projection", "self_attention.out_proj"),
        (r"mlp\.hidden", "mlp.0"),
        (r"mlp\.output", "mlp.3"),
    ],
    "transformers": [
        (r"^patch_embedding", "vit.embeddings.patch_embeddings.projection"),
        (r"^class_token", "vit.embeddings.cls_token"),
        (r"^position_embedding", "vit.embeddings.position_embeddings"),
        (r"^norm", "vit.layernorm"),
        (r"^head", "classifier"),
        (r"^blocks\.", "vit.layers."),
        (r"\.norm1", ".layernorm_before"),
        (r"\.norm2", ".layernorm_after"),
        (r"attention\.projection", "attention.o_proj"),
        (r"mlp\.hidden", "mlp.fc1"),
        (r"mlp\.output", "mlp.fc2"),
    ],
}


def from_options(options: Options) -> ViT:
    """The patchword model of a benchmark, in evaluation mode. Its logits depend on all its weights:
    the head, the class token and the biases, zero at first, are drawn too."""
    changes = {key: value for key in ("depth", "width") if (value := getattr(options, key))}
    torch.manual_seed(options.seed)
    model = create_model(options.model, options.classes, options.image_size, **changes)
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


def state_for(library: str, model: ViT) -> dict[str, Tensor]:
    """The parameters of `model` under the names and in the shapes of `library`."""
    spec = model.spec
    state: dict[str, Tensor] = {}
    for ours, value in model.state_dict().items():
        if ours == "patch_embedding.weight":  # ours has the channels last within a patch
            value = value.view(spec.width, *spec.patch_size, spec.in_channels)
            value = value.permute(0, 3, 1, 2).contiguous()
        name = ours
        for pattern, replacement in NAMES[library]:
            name = re.sub(pattern, replacement, name)
        if library == "transformers" and "attention.qkv" in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("qkv", f"{part}_proj")] = rows
        else:
            state[name] = value
    return state


class Logits(nn.Module):
    """A transformers model that returns its logits only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def _timm(spec: ViTSpec) -> Any:
    module = importlib.import_module("timm.models.vision_transformer")
    return module.VisionTransformer(
        img_size=spec.image_size,
        patch_size=spec.patch_size,
        in_chans=spec.in_channels,
        num_classes=spec.num_classes,
        embed_dim=spec.width,
        depth=spec.depth,
        num_heads=spec.heads,
        mlp_ratio=spec.mlp_width / spec.width,
    )


def _torchvision(spec: ViTSpec) -> Any:
    module = importlib.import_module("torchvision.models.vision_transformer")
    return module.VisionTransformer(
        image_size=spec.image_size[0],
        patch_size=spec.patch_size[0],
        num_layers=spec.depth,
        num_heads=spec.heads,
        hidden_dim=spec.width,
        mlp_dim=spec.mlp_width,
        num_classes=spec.num_classes,
    )


def _transformers(spec: ViTSpec) -> Any:
    library = importlib.import_module("transformers")
    config = library.ViTConfig(
        hidden_size=spec.width,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.heads,
        intermediate_size=spec.mlp_width,
        layer_norm_eps=spec.norm_eps,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        num_channels=spec.in_channels,
        num_labels=spec.num_classes,
        attn_implementation="sdpa",
    )
    return library.ViTForImageClassification(config)


def _vit_pytorch(spec: ViTSpec) -> Any:
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


BUILDERS: dict[str, Callable[[ViTSpec], Any]] = {
    "timm": _timm,
    "transformers": _transformers,
    "torchvision": _torchvision,
    "vit-pytorch": _vit_pytorch,
}


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
    peer = BUILDERS[library](spec)
    if library in NAMES:
        peer.load_state_dict(state_for(library, model))
        extra = 0
    else:
        patch = spec.patch_size[0] * spec.patch_size[1] * spec.in_channels
        extra = 2 * patch + 2 * spec.width - 3 * spec.width * spec.depth
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (model, peer))
    if theirs != ours + extra:
        raise PatchwordError(f"{library} has {theirs:,} parameters, not {ours + extra:,}")
    return Logits(peer) if library == "transformers" else peer


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
            library: difference(library, model) for library in installed() if library in NAMES
        },
    }
