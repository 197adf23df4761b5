"""Models to weight files, of patchword's own format and of others: whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchword.models.model import Model
from patchword.spec.model import ModelSpec
from patchword.spec.parse import PatchwordError, UsageError, nearest
from patchword.weights.files import CONFIG, PREPROCESSOR, SINGLE, open_container
from patchword.weights.formats import FORMATS
from patchword.weights.load import describe_weights
from patchword.weights.mapping import Written
from patchword.weights.native import load_tensors, sync, write_model, write_safetensors

logger = logging.getLogger("patchword")
FILES = (".safetensors", ".npz", ".pth", ".pt", ".bin")
UNTOLD = ("heads", "activation", "norm_eps", "weight_eps", "probability")
"""Fields that change what a model computes and that no tensor's shape tells."""


def save_model(
    model: Model,
    path: str | Path,
    *,
    format: str = "patchword",
    overwrite: bool = False,
    **extra: Any,
) -> Path:
    """Save a model in a format: `patchword` (a `.safetensors` file), or that of another library, a
    file whose name ends as the format's do, or a folder with its `config.json`.

    What is there is replaced in one step once the new one is complete and was read back. `extra`
    (JSON values) is kept in the header of patchword's format. The log says which settings a foreign
    file does not tell, and that it holds no calibration or no class names: the logits stay as they
    are. Raises `PatchwordError` if `path` exists and `overwrite` is not set, or the format cannot
    hold the model; `UsageError` on unknown formats and names of files.
    """
    with saving(model, path, format=format, overwrite=overwrite, **extra):
        return Path(path)


@contextmanager
def saving(
    model: Model, path: str | Path, *, format: str, overwrite: bool, **extra: Any
) -> Iterator[Path]:
    """`save_model`, with the place of what was written and read back: it becomes `path` when the
    block ends, and nothing does if the block raises."""
    path = Path(path)
    if format == "patchword":
        _make_way(path, False, overwrite)
        with _replacing(path) as temporary:
            write_model(temporary, model, **extra)
            load_tensors(temporary)
            yield temporary
        return
    if extra:
        raise UsageError(f"the format {format} has no place for {', '.join(extra)}; leave it out")
    written, folder = _foreign(model, path, format)
    _make_way(path, folder, overwrite)
    tensors = {name: value.cpu().float() for name, value in written.tensors.items()}
    with _replacing(path) as temporary:
        if folder:
            _write_folder(temporary, written, tensors)
        else:
            _write_file(temporary, path.suffix, tensors)
        _compare(temporary, tensors)
        _say_untold(model, temporary, path)
        del written, tensors  # they take as much memory as the model
        yield temporary


def _foreign(model: Model, path: Path, format: str) -> tuple[Written, bool]:
    """A model in the terms of a format, and whether it becomes a folder at `path`. Raises
    `UsageError` if it cannot be written there."""
    known = next((f for f in FORMATS if f.name == format), None)
    if known is None or known.write is None:
        raise UsageError(
            f"patchword writes no format {format!r}{nearest(format, writable_formats())}"
        )
    written = known.write(model)
    if path.suffix in known.suffixes:
        return written, False
    if written.config and path.suffix not in FILES:
        return written, True
    kinds = [f"a file {suffix}" for suffix in known.suffixes]
    kinds += ["a folder"] if written.config else []
    raise UsageError(f"{path}: the format {known.name} is written to {' or '.join(kinds)}")


def writable_formats() -> list[str]:
    """Names of the formats that `save_model` writes."""
    return ["patchword", *(known.name for known in FORMATS if known.write is not None)]


def _make_way(path: Path, folder: bool, overwrite: bool) -> None:
    """Raises `PatchwordError` if a file, or a folder, must not be written to `path`."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return
    if not overwrite:
        raise PatchwordError(f"{path} exists; pass overwrite=True to replace it")
    if folder != path.is_dir():
        raise PatchwordError(
            f"{path} is a {'file' if folder else 'folder'} and would become the other; choose "
            "another name"
        )
    strangers = {p.name for p in path.iterdir()} - {SINGLE, CONFIG, PREPROCESSOR} if folder else ()
    if strangers:
        raise PatchwordError(
            f"{path} holds more than weights ({min(strangers)}); choose another name"
        )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A place next to `path` to write to, which takes its place if all goes well, and otherwise
    leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    aside = path.with_name(f"{temporary.name}.old")
    try:
        yield temporary
        if path.is_dir():
            path.rename(aside)
            temporary.rename(path)
            shutil.rmtree(aside)
        else:
            temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def _write_folder(folder: Path, written: Written, tensors: dict[str, Tensor]) -> None:
    folder.mkdir()
    write_safetensors(folder / SINGLE, tensors)
    for name, values in ((CONFIG, written.config), (PREPROCESSOR, written.preprocessor)):
        if values:
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            sync(folder / name)
    sync(folder)


def _write_file(path: Path, suffix: str, tensors: dict[str, Tensor]) -> None:
    match suffix:
        case ".npz":
            with zipfile.ZipFile(path, "w") as archive:
                for name, value in tensors.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, value.numpy(), allow_pickle=False)
        case ".pth":
            torch.save(tensors, path)
        case _:
            write_safetensors(path, tensors)
    sync(path)


def _compare(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises `PatchwordError` unless what was written reads as it is, bit for bit."""
    back = open_container(path, trust_pickle=True)
    same = back.shapes.keys() == tensors.keys()
    if not same or not all(torch.equal(back.tensor(n), value) for n, value in tensors.items()):
        raise PatchwordError(
            "what was written does not read back the same; the disk or the memory may be faulty, "
            "or the model is not finite"
        )


def _say_untold(model: Model, written: Path, path: Path) -> None:
    """Log what a reader of the file has to be told, and what no reader can be."""
    if model.calibration is not None:
        logger.warning(
            "%s has no place for the calibration: whoever reads it gets the same logits, and has "
            "to divide them by %.6g before they become probabilities",
            *(path, model.temperature),
        )
    file = describe_weights(written, trust_pickle=True, image_size=model.spec.image_size)
    if model.classes and not file.classes:
        logger.warning(
            "%s has no place for the class names: whoever reads it numbers the classes, or is told "
            "their names (--classes)",
            path,
        )
    lost = [f"{name}={value!r}" for name, value in untold(model.spec, file.spec).items()]
    if lost:
        logger.warning("%s does not tell %s; say so when loading it", path, ", ".join(lost))


def untold(spec: ModelSpec, told: ModelSpec) -> dict[str, Any]:
    """The fields of a model's spec of which a file tells other values, `told`, or none."""
    fields = {name: value for name, value in vars(spec).items() if name in UNTOLD}
    return {name: value for name, value in fields.items() if value != vars(told).get(name)}
