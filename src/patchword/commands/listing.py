"""`patchword models` and `recipes`: the variants of every family, one of them layer by layer, and
what a recipe costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from patchword.models.summary import LayerRow, layer_table
from patchword.models.zoo import list_models, model_cost, model_spec
from patchword.objectives import training_exaflops
from patchword.spec.model import MixerSpec, ModelSpec, ResNetSpec, ViTSpec
from patchword.training.recipes import Recipe, recipe_spec


@dataclass(frozen=True)
class Variant:
    """A named variant and what it costs."""

    name: str
    spec: ModelSpec
    parameters: int
    macs: int
    """multiply-accumulates of one image's forward pass"""

    @property
    def family(self) -> str:
        """ViT, hybrid, BiT or Mixer."""
        match self.spec:
            case ViTSpec():
                return "hybrid" if self.spec.stem else "ViT"
            case ResNetSpec():
                return "BiT"
            case _:
                return "Mixer"

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of the spec that tell the family's variants apart."""
        match self.spec:
            case ViTSpec() as spec:
                stem = {"stem_layers": list(spec.stem.layers)} if spec.stem else {}
                names = ("depth", "width", "mlp_width", "heads")
                return {name: getattr(spec, name) for name in names} | stem
            case ResNetSpec() as spec:
                return {"layers": list(spec.layers), "width_factor": spec.width_factor}
            case spec:
                names = ("depth", "width", "tokens_mlp_width", "channels_mlp_width")
                return {name: getattr(spec, name) for name in names}

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The shape as the columns layers, width, MLP and heads of a table of all families."""
        match self.spec:
            case ViTSpec() as spec:
                stem = f"{_sum(spec.stem.layers)}, " if spec.stem else ""
                layers = f"{stem}{spec.depth}"
                return layers, str(spec.width), str(spec.mlp_width), str(spec.heads)
            case ResNetSpec() as spec:
                return _sum(spec.layers), f"x{spec.width_factor}", "", ""
            case MixerSpec() as spec:
                mlp = f"{spec.tokens_mlp_width}, {spec.channels_mlp_width}"
                return str(spec.depth), str(spec.width), mlp, ""
            case spec:
                raise TypeError(f"{type(spec).__name__} is no family of models")

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `patchword models --json`."""
        about = {"name": self.name, "family": self.family, **self.shape}
        return about | {"parameters": self.parameters, "gmacs": self.macs / 1e9}


def _sum(layers: tuple[int, ...]) -> str:
    """Blocks per stage; a stem may have a root alone."""
    return "+".join(map(str, layers)) or "root"


def variant(
    name: str, *, image_size: int | tuple[int, int] = 224, num_classes: int = 1000
) -> Variant:
    """One variant, whose images are of `image_size` pixels (one side, or (height, width)). Raises
    `UsageError` on unknown names and sizes that it does not take."""
    spec = model_spec(name, image_size=image_size, num_classes=num_classes)
    return Variant(name, spec, *model_cost(spec))


def variants() -> list[Variant]:
    """All of `list_models()`, at 224 pixels."""
    return [variant(name) for name in list_models()]


def layers(found: Variant) -> list[LayerRow]:
    """The parts of the variant's model, then their total, whose shape is the output's."""
    rows = layer_table(found.spec)
    return [
        *rows,
        LayerRow(
            "total",
            rows[-1].shape,
            sum(row.parameters for row in rows),
            sum(row.macs for row in rows),
            sum(row.activation_bytes for row in rows),
        ),
    ]


def recipe_cost(recipe: Recipe) -> str:
    """What a recipe costs on the data it is for: images seen and exaFLOPs (section 4.4)."""
    spec = recipe_spec(recipe.name, "")
    if spec.time is not None:
        return f"{spec.time} of training"
    if spec.steps == 0:
        return "one pass over the images"
    images = (spec.steps or 0) * spec.batch_size
    if spec.epochs is not None:
        if recipe.images is None:
            return f"{spec.epochs:g} epochs of the data"
        images = round(spec.epochs * recipe.images)
    if spec.model is None:
        return f"{images:,} images; exaFLOPs by the model that --init names"
    model = model_spec(spec.model, image_size=spec.size, **spec.options.given())
    cost = training_exaflops(spec, model, images)
    return f"{images:,} images, {cost:.3g} exaFLOPs"
