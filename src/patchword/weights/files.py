"""Files of tensors from anywhere: names and shapes first, values one at a time, no code run."""

from __future__ import annotations

import json
import math
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from patchword.spec.parse import PatchwordError, UsageError, nearest
from patchword.weights.google.npz import UNREADABLE, Contents, fill, open_npz, open_zip
from patchword.weights.pretrained import PRETRAINED

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
STANDARD = (SINGLE, INDEX, PICKLE)
"""Names of weights that a config.json lies next to."""
KEY = "patchword"
"""In the metadata of the header of patchword's own files, which need no config.json."""
HUB = "hub:"
LONGEST_HEADER = 32 << 20
LONGEST_JSON = 32 << 20
NESTS = (
    *("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict"),
    *("teacher", "module", "net"),
)
"""Where training programs put the weights in their checkpoints; averaged ones first."""
NAMING = ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4")
"""Opcodes of a pickle that name something of a module."""
HARMLESS = re.compile(
    r"torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)|torch [A-Z]\w*Storage|torch Size"
    r"|torch (b?float|u?int)\d+\w*|torch bool|collections (OrderedDict|defaultdict|Counter)"
    r"|(__builtin__|builtins) (set|int|float|list|dict)"
)
"""Names that a state dict, or a checkpoint around it, may be made of."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""How safetensors names them."""


@dataclass(frozen=True, kw_only=True)
class Container(Contents):
    """The tensors of a file or folder, and what lies next to them."""

    path: Path
    config: dict[str, Any]
    """`config.json` and, under "preprocessor", `preprocessor_config.json`"""


def open_container(path: str | Path, *, trust_pickle: bool = False) -> Container:
    """What a file, a folder, a run directory, `hub:ORG/NAME[@REVISION]` or a row of `PRETRAINED`
    holds, recognised by its content: safetensors (also in several files with an index), `.npz`, or
    a PyTorch pickle.

    A pickle is read only with `trust_pickle`, and then tensors only. Raises `PatchwordError` if
    there is none of these, or it is damaged, or claims more than it can hold.
    """
    hub = _on_the_hub(str(path))
    place = Path(path) if hub is None else download(hub, trust_pickle=trust_pickle)
    file = find_weights(place)
    contents = _contents(file, trust_pickle)
    if not contents.shapes:
        raise PatchwordError(f"{file} holds no tensors; use another file")
    beside = place if place.is_dir() else file.parent if file.name in STANDARD else None
    config = {} if beside is None or KEY in contents.metadata else _configs(beside)
    return Container(**vars(contents), path=file, config=config)


def _on_the_hub(path: str) -> str | None:
    """The `ORG/NAME[@REVISION]` that `hub:...` means, or the name of a row of `PRETRAINED` which no
    file here has; None for files."""
    if path.startswith(HUB):
        return path.removeprefix(HUB)
    known = PRETRAINED.get(path)
    return None if known is None or Path(path).exists() else known.hub


def find_weights(path: str | Path) -> Path:
    """The weight file that `path` means: a file; a checkpoint folder (the averaged weights if it
    has them); a run directory (`best`, else `last`); a folder as Hugging Face has them, or with one
    weight file in it. Raises `PatchwordError` if there is none."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        bare = path.parent == Path() and not path.suffix
        names = f", nor pretrained weights{nearest(str(path), PRETRAINED)}" if bare else ""
        raise PatchwordError(f"no such file or run directory: {path}{names}")
    for folder in (path, path / "best", path / "last"):
        for name in ("average.safetensors", SINGLE):
            if (folder / name).is_file():
                return folder / name
    for name in (INDEX, PICKLE):
        if (path / name).is_file():
            return path / name
    only = sorted(p for p in path.glob("*") if p.suffix in (".safetensors", ".npz"))
    if len(only) == 1:
        return only[0]
    if only:
        raise PatchwordError(f"{path} holds {len(only)} weight files; name one: {only[0]}, ...")
    raise PatchwordError(f"{path} holds no weights (best/, last/, {SINGLE}, {PICKLE} or *.npz)")


def _contents(path: Path, trust_pickle: bool) -> Contents:
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"PK\3\4"):
        archive = open_zip(path)
        names = archive.namelist()
        if names and all(name.endswith(".npy") for name in names):
            return open_npz(path, archive)
        if any(name.split("/")[-1] == "data.pkl" for name in names):
            return _open_pickle(path, archive, trust_pickle)
        raise PatchwordError(f"{path} is a zip archive, but neither .npz nor PyTorch's")
    if start[8:] == b"{" or path.suffix == ".safetensors":
        return open_safetensors(path)
    if start[:1] == b"\x80" or path.suffix in (".pth", ".pt", ".bin", ".pkl"):
        raise PatchwordError(
            f"{path} is a pickle of the old kind, which patchword does not read; save it again: "
            "torch.save(torch.load(FILE, weights_only=True), OTHER)"
        )
    raise PatchwordError(
        f"{path} is no weight file: its content is neither safetensors, .npz nor PyTorch's"
    )


# safetensors --------------------------------------------------------------------------------------


def open_safetensors(path: Path) -> Contents:
    """The tensors of one file, each read into memory of its own. Raises `PatchwordError` unless the
    header fits the file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LONGEST_HEADER:
                raise ValueError(f"its header claims to be {length:,} bytes long")
            with safe_open(path, framework="pt"):  # checks the header against the file
                header = json.loads(file.read(length), object_pairs_hook=_distinct)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise PatchwordError(f"{path} is not a readable safetensors file: {error}") from None
    metadata = header.pop("__metadata__", None) or {}

    def tensor(name: str) -> Tensor:
        entry = header[name]
        if entry["dtype"] not in DTYPES:
            raise PatchwordError(f"{path}: {name} is of type {entry['dtype']}; save it as float32")
        value = torch.empty(math.prod(entry["shape"]), dtype=DTYPES[entry["dtype"]])
        try:
            with path.open("rb") as file:
                file.seek(8 + length + entry["data_offsets"][0])
                fill(file, value.view(torch.uint8).numpy())
        except (OSError, EOFError) as error:
            raise PatchwordError(f"{path}: {name} cannot be read: {error}") from None
        return value.reshape(entry["shape"])

    return Contents({n: tuple(entry["shape"]) for n, entry in header.items()}, tensor, metadata)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("it names something twice")
    return entries


def _open_shards(index: Path) -> Contents:
    """The tensors of the files that an index names, which lie next to it."""
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise PatchwordError(f"{index} has no weight_map; use another copy")
    shards: dict[str, Contents] = {}
    for name, file in places.items():
        if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
            raise PatchwordError(
                f"{index} is not to be trusted: it places {name!r} outside of its folder, in "
                f"{file!r}"
            )
        if file not in shards:
            shards[file] = open_safetensors(index.with_name(file))
        if name not in shards[file].shapes:
            raise PatchwordError(f"{index} places {name!r} in {file}, where it is not")
    return Contents(
        {name: shards[file].shapes[name] for name, file in places.items()},
        lambda name: shards[places[name]].tensor(name),
    )


# Pickles ------------------------------------------------------------------------------------------


def _open_pickle(path: Path, archive: zipfile.ZipFile, trust: bool) -> Contents:
    """The state dict of a file by `torch.save`, its tensors mapped from the file."""
    if not trust:
        raise PatchwordError(
            f"{path} is a pickle, which can do more than hold tensors; if you trust where it is "
            "from, pass --trust-pickle (in Python trust_pickle=True)"
        )
    with archive:
        _check_pickle(path, archive)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a crafted or damaged file makes of it
        raise PatchwordError(
            f"{path} is damaged or no state_dict ({type(error).__name__} while it was read); use "
            "another copy"
        ) from None
    tensors = _state_dict(loaded, path)
    claimed = sum(t.numel() * t.element_size() for t in tensors.values())
    if claimed > 2 * path.stat().st_size:
        raise PatchwordError(f"{path} is not to be trusted: its tensors claim more than it holds")
    return Contents({n: tuple(t.shape) for n, t in tensors.items()}, tensors.__getitem__)


def _check_pickle(path: Path, archive: zipfile.ZipFile) -> None:
    """Raises `PatchwordError` if a pickle names anything but what tensors and dictionaries need:
    torch's own list has things that take as much memory as they are told to."""
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise PatchwordError(
                f"{path} is compressed, which torch.save does not do; save it again"
            )
        if entry.filename.split("/")[-1] != "data.pkl":
            continue
        try:
            strange = _strange_name(archive.read(entry))
        except UNREADABLE as error:
            raise PatchwordError(f"{path} is damaged: {error}; use another copy") from None
        if strange:
            raise PatchwordError(
                f"{path} holds more than tensors ({strange:.80}), and patchword runs no code from "
                "files; save its state_dict alone"
            )


def _strange_name(pickled: bytes) -> str | None:
    """The first name in a pickle that is not harmless; nothing is unpickled."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL" and HARMLESS.fullmatch(str(argument)):
            continue
        if opcode.name in NAMING:
            return str(argument or "a name put together").replace(" ", ".")
    return None


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name, out of what training programs wrap them in."""
    for _ in NESTS:
        if not isinstance(loaded, Mapping):
            raise PatchwordError(f"{path} holds a {type(loaded).__name__}, not a state_dict")
        inner = [loaded[key] for key in NESTS if isinstance(loaded.get(key), Mapping)]
        if not inner:
            break
        loaded = inner[0]
    tensors: dict[str, Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            continue
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.is_quantized:
            raise PatchwordError(f"{path}: {name} is not an ordinary tensor; save it as one")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise PatchwordError(f"{path} is not to be trusted: {name} claims more than it holds")
        tensors[name] = value.detach()
    for prefix in ("module.", "_orig_mod.", "module."):  # of parallel and compiled models
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


# Next to the tensors ------------------------------------------------------------------------------


def _configs(folder: Path) -> dict[str, Any]:
    config, preprocessor = folder / CONFIG, folder / PREPROCESSOR
    values = _json(config) if config.is_file() else {}
    return values | ({"preprocessor": _json(preprocessor)} if preprocessor.is_file() else {})


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LONGEST_JSON:
            raise ValueError(f"it is longer than {LONGEST_JSON:,} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PatchwordError(f"{path} cannot be read: {error}; use another copy") from None
    if not isinstance(values, dict):
        raise PatchwordError(f"{path} holds no JSON object; use another copy")
    return values


def download(name: str, *, trust_pickle: bool = False) -> Path:
    """The local folder of the hub's `ORG/NAME[@REVISION]`, fetched where it is not in the cache.

    Pickles are fetched only with `trust_pickle` and where there is nothing else. Nothing else is
    said to the hub: its library's reports of usage are off. Raises `PatchwordError` if the hub
    cannot be reached or does not have it.
    """
    repo, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UsageError(f"hub:{name} is no name on the hub; write hub:ORG/NAME[@REVISION]")
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError:
        raise PatchwordError(
            f"hub:{name} needs an extra; run: pip install 'patchword[hub]'"
        ) from None
    constants.HF_HUB_DISABLE_TELEMETRY = True
    configs = [CONFIG, PREPROCESSOR]
    safe = ["model*.safetensors", INDEX, "*.npz"]
    try:
        folder = Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=[*configs, *safe])
        )
        if trust_pickle and not any(file for pattern in safe for file in folder.glob(pattern)):
            snapshot_download(repo, revision=revision or None, allow_patterns=[*configs, PICKLE])
    except Exception as error:  # of the network, the hub or the cache
        reason = " ".join(str(error).split())[:200]
        raise PatchwordError(
            f"hub:{name} cannot be fetched ({type(error).__name__}: {reason}); check the name and "
            "the network, or give a local folder"
        ) from None
    return folder
