"""Models from weight files: patchword's own, and those of the formats that it knows."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchword.data.class_names import ClassNames, read_class_names
from patchword.models.model import Model, init_lecun
from patchword.models.position import resample_positions
from patchword.models.zoo import resized, spec_from_dict, unfilled_model, variant_name
from patchword.spec.model import (
    CalibrationSpec,
    MixerSpec,
    ModelSpec,
    PreprocessSpec,
    ResNetSpec,
    ViTSpec,
)
from patchword.spec.parse import PatchwordError, UsageError, parse, to_dict
from patchword.weights import mapping
from patchword.weights.files import KEY, Container, open_container
from patchword.weights.formats import WeightFormat, recognise
from patchword.weights.mapping import Reading
from patchword.weights.native import load_tensors, read_header

logger = logging.getLogger("patchword")
LARGEST_FIXED = 64 << 20
"""Bytes of a fixed position table that a file may ask for, whatever its own size."""


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """What a weight file says of itself, or its names and shapes tell."""

    path: Path
    spec: ModelSpec
    preprocess: PreprocessSpec
    classes: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    """what patchword's writer added, such as the step"""
    calibration: CalibrationSpec | None = None
    format: str = "patchword"
    notes: tuple[str, ...] = ()
    """what was assumed, and whatever else a user should know"""

    @property
    def model(self) -> str:
        """The name of its variant."""
        return variant_name(self.spec)

    def __str__(self) -> str:
        height, width = self.spec.image_size
        head = f"{self.spec.num_classes:,} classes" if self.spec.num_classes else "no head"
        what = f"{self.path}: {self.format} weights of {self.model}, {height}x{width} px, {head}"
        return "; ".join([what, *self.notes])


def describe_weights(path: str | Path, *, trust_pickle: bool = False, **hints: Any) -> WeightsFile:
    """What a weight file, folder, run directory or `hub:ORG/NAME` holds, from names, shapes and
    configuration; no tensor is read. Takes and raises what `read_weights` does."""
    return _described(open_container(path, trust_pickle=trust_pickle), hints)[0]


def read_weights(
    path: str | Path, *, trust_pickle: bool = False, **hints: Any
) -> tuple[dict[str, Tensor], WeightsFile]:
    """The tensors of a weight file, folder, run directory or `hub:ORG/NAME`, float32 under our
    names, and its description.

    `hints` are fields of the spec that the tensors of a foreign format do not tell (heads,
    activation, norm_eps); they win over what is inferred. `image_size`, (height, width), is taken
    where it is one for which a position table has so many entries. Raises `PatchwordError` if
    the file is missing, damaged, in no known format, or not finite, or if it is a pickle without
    `trust_pickle`; `UsageError` on unknown hints.
    """
    container = open_container(path, trust_pickle=trust_pickle)
    where = container.path
    ours = load_tensors(where)[0] if KEY in container.metadata else {}
    file, reading = _described(container, hints)
    if reading is None:
        return {name: _checked(value, f"{where}: {name}") for name, value in ours.items()}, file
    return mapping.read(
        lambda name: _checked(container.tensor(name), f"{where}: {name}"),
        container.shapes,
        reading,
        str(where),
    ), file


def _checked(value: Tensor, what: str) -> Tensor:
    if not value.is_floating_point():
        raise PatchwordError(f"{what} is {value.dtype}, not floating point; use another copy")
    value = value.float()
    if value.numel() and not all(torch.isfinite(end) for end in value.aminmax()):
        raise PatchwordError(f"{what} has values that are not finite; use another copy")
    return value


def _described(container: Container, hints: dict[str, Any]) -> tuple[WeightsFile, Reading | None]:
    """The description, and for a foreign format how it is read."""
    if KEY in container.metadata:
        said = [name for name in hints if name != "image_size"]
        if said:
            raise UsageError(f"{container.path} itself says its {', '.join(said)}; leave that out")
        file, reading = _native(container), None
    else:
        known, reading = _foreign(container, hints)
        fits = len(reading.classes) in (0, reading.spec.num_classes)
        file = WeightsFile(
            path=container.path,
            spec=reading.spec,
            preprocess=reading.preprocess,
            classes=reading.classes if fits else (),
            format=known.name,
            notes=reading.notes,
        )
    _check_honest(file.spec, container)
    return file, reading


def _native(container: Container) -> WeightsFile:
    header, path = read_header(container.path, container.metadata), container.path
    try:
        model, classes, extra = header["model"], header["classes"], header["extra"]
        measured = header.get("calibration")
        kinds = isinstance(model, dict), isinstance(classes, list), isinstance(extra, dict)
        if not all(kinds) or not all(isinstance(name, str) for name in classes):
            raise UsageError("model, classes or extra is of the wrong type")
        return WeightsFile(
            path=path,
            spec=spec_from_dict(model),
            preprocess=parse(PreprocessSpec, header["preprocess"]),
            classes=tuple(classes),
            extra=extra,
            calibration=None if measured is None else parse(CalibrationSpec, measured),
        )
    except KeyError as error:
        raise PatchwordError(f"{path} holds no model: its header lacks {error}") from None
    except UsageError as error:
        raise PatchwordError(f"{path} is damaged or newer than this patchword: {error}") from None


def _foreign(container: Container, hints: dict[str, Any]) -> tuple[WeightFormat, Reading]:
    path, shapes, config = container.path, container.shapes, container.config
    try:
        known = recognise(shapes, config, str(path))
        return known, known.find(shapes, config, hints)
    except PatchwordError as error:
        if hints.keys() - {"image_size"} and isinstance(error, UsageError):
            raise
        said = str(error)
        raise PatchwordError(said if str(path) in said else f"{path}: {said}") from None
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise PatchwordError(
            f"{path}: its tensors or its config.json make no sense ({type(error).__name__}: "
            f"{error}); use another copy"
        ) from None


def _check_honest(spec: ModelSpec, container: Container) -> None:
    """Raises `PatchwordError` if building the spec's model would take more than its file holds."""
    fixed = 0
    match spec:
        case ViTSpec():
            blocks = spec.depth + sum(spec.stem.layers if spec.stem else ())
            if spec.position in ("sincos2d", "rotary"):
                tables = spec.depth if spec.position_at == "every" else 1
                fixed = 4 * math.prod(spec.grid) * spec.width * tables
        case ResNetSpec():
            blocks = sum(spec.layers)
        case MixerSpec():
            blocks = spec.depth
        case _:
            raise TypeError(f"{type(spec).__name__} is no family of models")
    if blocks > len(container.shapes) or fixed > LARGEST_FIXED + container.path.stat().st_size:
        raise PatchwordError(
            f"{container.path} is damaged: it claims to be {variant_name(spec)} for "
            f"{spec.image_size[0]}x{spec.image_size[1]} px, but is too small; use another copy"
        )


def load_model(
    path: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
    trust_pickle: bool = False,
    classes: ClassNames | None = None,
    **hints: Any,
) -> Model:
    """The model of a weight file, run directory, folder, `hub:ORG/NAME` or name of `PRETRAINED`, in
    evaluation mode and float32; the format is recognised by its content, and the log says what was
    found.

    With another `image_size` (pixels, one side or (height, width)) the position table is resampled
    in 2-D, and the log says so. `classes` names the classes where the file does not, or otherwise:
    `"imagenet"`, a file of names, or the names (`read_class_names`). `hints` as in `read_weights`.
    Raises `PatchwordError` if the file is missing, damaged, or does not fit its own spec;
    `UsageError` unless there is a name for each class.
    """
    names = None if classes is None else read_class_names(classes)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    hints |= {} if size is None else {"image_size": size}
    tensors, file = read_weights(path, trust_pickle=trust_pickle, **hints)
    _say_found(file)
    if names is not None and len(names) != file.spec.num_classes:
        what = classes if isinstance(classes, str | Path) else "classes"
        raise UsageError(
            f"{what} names {len(names):,} classes, the model has {file.spec.num_classes:,}; give a "
            "name for each, in the model's order"
        )
    spec = resized(file.spec, size or file.spec.image_size)
    model = assembled(tensors, file, spec, classes=file.classes if names is None else names)
    model.calibration = file.calibration
    if file.calibration is not None and spec.image_size != file.spec.image_size:
        logger.warning(
            "%s was calibrated at %dx%d px; at %dx%d px its probabilities may be off: calibrate "
            "it again",
            *(file.path, *file.spec.image_size, *spec.image_size),
        )
    return model.requires_grad_(True).to(device).eval()


def transfer(
    path: str | Path,
    *,
    num_classes: int,
    image_size: tuple[int, int],
    trust_pickle: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Model:
    """A model to fine-tune: the saved body, a zero-initialised linear head for `num_classes`, and
    the position table resampled to `image_size` (section 3.2).

    `options` are regularisers of the spec to change (dropout, drop_path), or another `head`. The
    log says what was found and resampled, unless `quiet`: for a model that is only tried. Raises
    `PatchwordError` if an option would change the body's tensors.
    """
    tensors, file = read_weights(path, trust_pickle=trust_pickle, image_size=image_size)
    if not quiet:
        _say_found(file)
    head = {"head": "linear", "head_width": None} if isinstance(file.spec, ViTSpec) else {}
    values = to_dict(resized(file.spec, image_size)) | head | {"num_classes": num_classes}
    spec = parse(type(file.spec), values | options)
    model = assembled(tensors, file, spec, fresh_head=True, quiet=quiet)
    return model.requires_grad_(True)


def _say_found(file: WeightsFile) -> None:
    if file.format != "patchword":
        logger.info("%s", file)


def say_resampled(path: Path, old: ModelSpec, new: ModelSpec) -> None:
    """Says that the position table of a ViT's weights was fitted to another image size, if it
    was."""
    if (
        isinstance(old, ViTSpec)
        and isinstance(new, ViTSpec)
        and old.grid != new.grid
        and new.position in ("learned-1d", "learned-2d", "relative")
    ):
        logger.warning(
            "%s: position table resampled from %dx%d to %dx%d patches for %dx%d px",
            *(path, *old.grid, *new.grid, *new.image_size),
        )


def assembled(
    tensors: dict[str, Tensor],
    file: WeightsFile,
    spec: ModelSpec,
    *,
    classes: tuple[str, ...] = (),
    fresh_head: bool = False,
    quiet: bool = False,
) -> Model:
    """The model of `spec` with a file's tensors, which it takes over without a copy."""
    _check_fit(tensors, _unfilled(file.spec, file.path), file.path)
    if isinstance(spec, ViTSpec) and isinstance(file.spec, ViTSpec):
        resample_positions(tensors, file.spec, spec)
    if not quiet:
        say_resampled(file.path, file.spec, spec)
    model = _unfilled(spec, file.path)
    model.preprocess, model.classes = file.preprocess, classes
    if fresh_head:
        for name in [name for name in tensors if name.startswith(model.HEADS)]:
            del tensors[name]
        tensors |= _fresh_head(model)
    _check_fit(tensors, model, file.path)
    model.load_state_dict(tensors, assign=True)
    return model


def _unfilled(spec: ModelSpec, path: Path) -> Model:
    """A model without memory for its parameters. Raises `PatchwordError` if none has that much."""
    try:
        return unfilled_model(spec)
    except RuntimeError as error:
        raise PatchwordError(f"{path}: its model cannot be built: {error}") from None


def _fresh_head(model: Model) -> dict[str, Tensor]:
    """What a new head starts from: zeros (section 3.2), a hidden layer as `init_weights` has it."""
    shapes = {n: v.shape for n, v in model.state_dict().items() if n.startswith(model.HEADS)}
    fresh = {name: torch.zeros(shape) for name, shape in shapes.items()}
    if "pre_logits.weight" in fresh:
        init_lecun(fresh["pre_logits.weight"])
    return fresh


def _check_fit(tensors: Mapping[str, Tensor], model: Model, path: Path) -> None:
    """Raises `PatchwordError` unless names and shapes are the model's."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    problems = [f"{name} is missing" for name in expected.keys() - shapes.keys()]
    problems += [f"{name} is unexpected" for name in shapes.keys() - expected.keys()]
    problems += [
        f"{name} is {list(shapes[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    mapping.fail_if(sorted(problems), str(path))
