"""Patchword's own weight files: one safetensors file that says what it is.

The header's metadata holds the model's spec, its preprocessing, its class names and a SHA-256 over
the tensors, so that a file loads by itself anywhere and a flipped bit is found on load.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from patchword.architecture import PreprocessSpec, ViTSpec
from patchword.models.position import resample_position_embedding, sincos_2d
from patchword.models.vit import ViT
from patchword.parsing import PatchwordError, parse, to_dict

logger = logging.getLogger("patchword")
KEY = "patchword"


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """What a weight file's header says."""

    path: Path
    spec: ViTSpec
    preprocess: PreprocessSpec
    classes: tuple[str, ...]
    extra: dict[str, Any]
    """what the writer added, such as the step"""


def find_weights(path: str | Path) -> Path:
    """The weight file that `path` means: a file; a checkpoint folder (the averaged weights if it
    has them); a run directory (`best`, else `last`). Raises `PatchwordError` if there is none."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise PatchwordError(f"no such file or run directory: {path}")
    for folder in (path, path / "best", path / "last"):
        for name in ("average.safetensors", "model.safetensors"):
            if (folder / name).is_file():
                return folder / name
    raise PatchwordError(f"{path} holds no weights (best/, last/ or model.safetensors)")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header, with a SHA-256 over both, and flush to the disk.

    Raises `OSError` when the disk is full or not writable.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    body = json.dumps(dict(header), sort_keys=True)
    metadata = {"format": "pt", KEY: body, "sha256": _digest(plain, body)}
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(plain, path, metadata=metadata)
        path.chmod(mode)  # safetensors leaves the file to its owner alone
    except SafetensorError as error:  # its I/O errors come wrapped
        raise OSError(f"cannot write {path}: {error}") from error
    sync(path)


def load_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file that `save_tensors` wrote, checked against its SHA-256.

    Raises `PatchwordError` if the file is damaged or somebody else's.
    """
    metadata, tensors = _read(path, device)
    if _digest(tensors, metadata[KEY]) != metadata.get("sha256"):
        raise PatchwordError(f"{path} is damaged: its checksum does not match; use another copy")
    return tensors, json.loads(metadata[KEY])


def _read(
    path: Path, device: str = "cpu", *, tensors: bool = True
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header's metadata, and the tensors if wanted, unchecked."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            names = list(file.keys()) if tensors else []
            found = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise PatchwordError(f"{path} is not a readable safetensors file: {error}") from None
    if KEY not in metadata:
        raise PatchwordError(
            f"{path} was not written by patchword: its header has no {KEY!r} entry"
        )
    return metadata, found


def _digest(tensors: Mapping[str, Tensor], body: str) -> str:
    digest = hashlib.sha256(body.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def model_header(model: ViT, **extra: Any) -> dict[str, Any]:
    """The header that makes a weight file loadable."""
    return {
        "model": to_dict(model.spec),
        "preprocess": to_dict(model.preprocess),
        "classes": list(model.classes),
        "extra": extra,
    }


def write_model(path: Path, model: ViT, **extra: Any) -> None:
    """Write a model's weights to `path`, in place. `extra` is kept in the header."""
    save_tensors(path, model.state_dict(), model_header(model, **extra))


def save_model(model: ViT, path: str | Path, *, overwrite: bool = False, **extra: Any) -> Path:
    """Save a model as one `.safetensors` file, replaced in one step once it is complete.

    `extra` (JSON values) is kept in the header. Raises `PatchwordError` if the file exists and
    `overwrite` is not set.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise PatchwordError(f"{path} exists; pass overwrite=True to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_model(temporary, model, **extra)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return path


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], WeightsFile]:
    """The tensors and the description of a model's weight file or run directory."""
    found = find_weights(path)
    tensors, header = load_tensors(found)
    return tensors, _described(found, header)


def describe_weights(path: str | Path) -> WeightsFile:
    """What a weight file or run directory holds, from its header alone."""
    found = find_weights(path)
    return _described(found, json.loads(_read(found, tensors=False)[0][KEY]))


def _described(path: Path, header: dict[str, Any]) -> WeightsFile:
    try:
        return WeightsFile(
            path=path,
            spec=parse(ViTSpec, header["model"]),
            preprocess=parse(PreprocessSpec, header["preprocess"]),
            classes=tuple(header["classes"]),
            extra=header["extra"],
        )
    except KeyError as error:
        raise PatchwordError(f"{path} holds no model: its header lacks {error}") from None


def load_model(
    path: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
) -> ViT:
    """The model of a weight file or run directory, in evaluation mode, float32 as saved.

    With another `image_size` (pixels, one side or (height, width)) the position table is resampled
    in 2-D, and the log says so. Raises `PatchwordError` if the file is missing, damaged, or does
    not fit its own spec.
    """
    tensors, file = read_weights(path)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    spec = resized(file.spec, size or file.spec.image_size)
    _say_resampled(tensors, file, spec)
    with torch.device("meta"):
        model = ViT(spec, preprocess=file.preprocess, classes=file.classes)
    fit_tensors(tensors, model, file)
    if model.fixed_position is not None:
        model.fixed_position = sincos_2d(spec.grid, spec.width)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(True).to(device).eval()


def resized(spec: ViTSpec, image_size: tuple[int, int]) -> ViTSpec:
    """The same model for another image size."""
    return parse(ViTSpec, to_dict(spec) | {"image_size": list(image_size)})


def fit_tensors(tensors: dict[str, Tensor], model: ViT, file: WeightsFile) -> None:
    """Resample the position table to the model's grid, in place, and check names and shapes."""
    if "position_embedding" in tensors:
        tensors["position_embedding"] = resample_position_embedding(
            tensors["position_embedding"], file.spec.grid, model.spec.grid
        )
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    problems = [f"{name} is missing" for name in wanted.keys() - given.keys()]
    problems += [f"{name} is unexpected" for name in given.keys() - wanted.keys()]
    problems += [
        f"{name} is {list(given[name])}, not {list(wanted[name])}"
        for name in wanted.keys() & given.keys()
        if wanted[name] != given[name]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise PatchwordError(f"{file.path}: {', '.join(sorted(problems)[:3])}{more}")


def transfer(
    path: str | Path, *, num_classes: int, image_size: tuple[int, int], **options: Any
) -> ViT:
    """A model to fine-tune: the saved body, a zero-initialised linear head for `num_classes`, and
    the position table resampled to `image_size` (section 3.2).

    `options` are regularisers of `ViTSpec` to change (dropout, drop_path), or another `head`.
    Raises `PatchwordError` if an option would change the body's tensors.
    """
    tensors, file = read_weights(path)
    values: dict[str, Any] = {"num_classes": num_classes, "head": "linear"} | options
    spec = parse(ViTSpec, to_dict(resized(file.spec, image_size)) | values)
    model = ViT(spec, preprocess=file.preprocess)
    heads = ("head.", "pre_logits.")
    fresh = {n: v for n, v in model.state_dict().items() if n.startswith(heads)}
    tensors = {n: v for n, v in tensors.items() if not n.startswith(heads)} | fresh
    _say_resampled(tensors, file, spec)
    fit_tensors(tensors, model, file)
    model.load_state_dict(tensors)
    return model


def _say_resampled(tensors: Mapping[str, Tensor], file: WeightsFile, spec: ViTSpec) -> None:
    if spec.grid != file.spec.grid and "position_embedding" in tensors:
        logger.warning(
            "%s: position table resampled from %dx%d to %dx%d patches for %dx%d px",
            *(file.path, *file.spec.grid, *spec.grid, *spec.image_size),
        )
