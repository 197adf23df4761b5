"""Patchword's own weight files: one safetensors file that says what it is.

The header's metadata holds the model's spec, its preprocessing, its class names, its calibration if
it has one, and a SHA-256 over it and the tensors, so that a file loads by itself anywhere and a
flipped bit is found on load.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from patchword.models.model import Model
from patchword.models.zoo import spec_to_dict
from patchword.spec.parse import PatchwordError, to_dict
from patchword.weights.files import KEY, open_safetensors


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header, with a SHA-256 over both, and flush to the disk.

    Raises `OSError` when the disk is full or not writable.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    body = json.dumps(dict(header), sort_keys=True)
    write_safetensors(path, plain, {KEY: body, "sha256": _digest(plain, body)})


def write_safetensors(
    path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write contiguous CPU tensors as any reader of the format takes them, and flush to the disk.

    Raises `OSError` when the disk is full or not writable.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
        path.chmod(mode)  # safetensors leaves the file to its owner alone
    except SafetensorError as error:  # its I/O errors come wrapped
        raise OSError(f"cannot write {path}: {error}") from error
    sync(path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file that `save_tensors` wrote, checked against its SHA-256.

    Raises `PatchwordError` if the file is damaged or somebody else's.
    """
    file = open_safetensors(path)
    tensors = {name: file.tensor(name) for name in file.shapes}
    if KEY in file.metadata and _digest(tensors, file.metadata[KEY]) != file.metadata.get("sha256"):
        raise PatchwordError(f"{path} is damaged: its checksum does not match; use another copy")
    return tensors, read_header(path, file.metadata)


def read_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The header that `save_tensors` put into a file's metadata. Raises `PatchwordError` if there
    is none."""
    if KEY not in metadata:
        raise PatchwordError(
            f"{path} was not written by patchword: its header has no {KEY!r} entry"
        )
    try:
        header = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise PatchwordError(f"{path} is damaged: its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise PatchwordError(f"{path} is damaged: its header is no JSON object; use another copy")
    return header


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


def model_header(model: Model, **extra: Any) -> dict[str, Any]:
    """The header that makes a weight file loadable."""
    measured = model.calibration
    return {
        "model": spec_to_dict(model.spec),
        "preprocess": to_dict(model.preprocess),
        "classes": list(model.classes),
        "extra": extra,
        **({} if measured is None else {"calibration": to_dict(measured)}),
    }


def write_model(path: Path, model: Model, **extra: Any) -> None:
    """Write a model's weights to `path`, in place. `extra` is kept in the header."""
    save_tensors(path, model.state_dict(), model_header(model, **extra))
