"""Hugging Face-layout parquet files, and data sets of the hub (extra `hub`)."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patchword.data.contents import digest_files
from patchword.data.images import BadImage
from patchword.data.sources import SPLITS, Source, group_parts, numbered, short_name
from patchword.spec.parse import PatchwordError

logger = logging.getLogger("patchword")
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
IN_MEMORY_BYTES = 1 << 30
"""Sources up to this size are read once; of larger ones a few row groups are kept."""
GROUPS_KEPT = 8

_INSTALL = "needs the extra hub; run: pip install -c constraints.txt -e '.[hub]'"


def parquet_files(root: Path) -> list[Path]:
    """Parquet files of the layouts that the Hugging Face hub uses."""
    files: list[Path] = []
    for base in (root, root / "data", root / "default"):
        folders = [base, *(base / split for split in SPLITS)]
        files += [file for folder in folders for file in folder.glob("*.parquet")]
    return sorted(file for file in files if not file.name.startswith("."))


def open_parquet(root: Path, files: Sequence[Path]) -> Source:
    """A source of parquet `files` (at or below `root`) with columns `image` and `label`.

    `image` is `{bytes, path}` or binary; `label` integers, with names in the `huggingface` schema
    metadata, or strings. Splits come from file or folder names. Raises `PatchwordError`.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise PatchwordError(f"{root}: parquet {_INSTALL}") from None
    base = root if root.is_dir() else root.parent
    reader = ParquetReader()
    labels: list[Any] = []
    splits: list[str] = []
    keys: list[str] = []
    names: list[str] | None = None
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                schema = opened.schema_arrow
                image = _column(schema.names, IMAGE_COLUMNS, file)
                label = _column(schema.names, LABEL_COLUMNS, file)
                _check_images(schema.field(image), file)
                found = opened.read(columns=[label], use_threads=False).column(label).to_pylist()
                if _unlabelled(found, str(file)):
                    continue
                reader.add(str(file), opened.metadata, image)
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:160]
            raise PatchwordError(f"{file} cannot be read ({reason}); get it again") from None
        named = _names(schema.metadata or {}, label)
        if labels and named != names:
            raise PatchwordError(f"{file}: class names differ from {files[0]}; give one set only")
        names = named
        labels += found
        key = file.relative_to(base).as_posix()
        keys += [f"{key}#{row}" for row in range(len(found))]
        splits += [_split(file.relative_to(base))] * len(found)
    if not keys:
        raise PatchwordError(f"{root} has no rows; give files with images")
    if "" in splits and any(splits):
        raise PatchwordError(
            f"{keys[splits.index('')].split('#')[0]} belongs to no split, other files do; name it "
            "train-..., validation-... or test-..., or move it away"
        )
    classes, numbers = _classes(labels, names, str(root))
    reader.preload()
    return Source(
        name=short_name(root.stem if root.is_file() else root.resolve().name),
        classes=classes,
        labels=numbers,
        keys=tuple(keys),
        sizes=np.array([file.stat().st_size for file in files], np.int64),
        reader=reader,
        parts=group_parts(splits),
    )


def _column(
    names: Sequence[str], candidates: Sequence[str], where: object, advice: str = "rename one"
) -> str:
    for name in candidates:
        if name in names:
            return name
    raise PatchwordError(
        f"{where}: no column {' or '.join(candidates)} (it has {', '.join(names)}); {advice}"
    )


def _check_images(column: Any, file: Path) -> None:
    """Raises `PatchwordError` unless an arrow field can hold encoded images."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise PatchwordError(
            f"{file}: column {column.name} holds {column.type}; it must hold the bytes of image "
            "files, as binary or in a struct with bytes"
        )


def _names(metadata: dict[bytes, bytes], label: str) -> list[str] | None:
    """Class names of the `huggingface` metadata."""
    try:
        feature = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"][label]
        names = feature["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _unlabelled(labels: Sequence[Any], where: str) -> bool:
    """Whether a part comes without labels, as test parts of competitions do; it is left out."""
    if not labels or any(label not in (None, -1) for label in labels):
        return False
    logger.warning("%s: %d images without labels are left out", where, len(labels))
    return True


def _classes(
    values: Sequence[Any], names: Sequence[str] | None, where: str
) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and int64 `[N]` labels. Integers without names become names of themselves."""
    if None in values or -1 in values:
        raise PatchwordError(f"{where}: images without a label; leave those rows out")
    if names is not None and all(isinstance(value, int) for value in values):
        numbers = np.array(values, np.int64)
        if numbers.min() < 0 or numbers.max() >= len(names):
            raise PatchwordError(
                f"{where}: labels from {numbers.min()} to {numbers.max()} but {len(names)} class "
                "names; correct either"
            )
        return tuple(names), numbers
    if not any(all(isinstance(value, kind) for value in values) for kind in (int, str)):
        raise PatchwordError(f"{where}: labels must be all whole numbers or all text; convert them")
    return numbered(values)


def _split(path: Path) -> str:
    """The part that a file belongs to, by its own name or else a folder's."""
    for text in (path.stem, *reversed(path.parent.parts)):
        word = re.split(r"[^A-Za-z]", text, maxsplit=1)[0]
        if part := SPLITS.get(word.lower()):
            return part
    return ""


class ParquetReader:
    """Images by row; row groups are decoded once and kept, all of them or the last few used."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._column = ""
        self._bytes = 0
        self._groups: list[tuple[int, int]] = []  # file, row group
        self._starts: list[int] = [0]
        self._columns: list[str] = []
        self._broken: dict[int, str] = {}  # row group, reason
        self._open: dict[int, Any] = {}
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}, "_cache": OrderedDict()}

    def add(self, file: str, metadata: Any, column: str) -> None:
        """Take the next file in."""
        number = len(self._columns)
        self._files.append(file)
        self._columns.append(column)
        for group in range(metadata.num_row_groups):
            self._groups.append((number, group))
            self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
            self._bytes += metadata.row_group(group).total_byte_size

    def preload(self) -> None:
        """Read everything now if it is small, so that forked workers share the memory."""
        if self._bytes <= IN_MEMORY_BYTES:
            for group in range(len(self._groups)):
                with contextlib.suppress(BadImage):  # raised again for each of its images
                    self._group(group)

    def _group(self, number: int) -> Any:
        """The encoded images of a row group, an arrow array of binary. Raises `BadImage`."""
        if number not in self._broken:
            try:
                return self._load(number)
            except (OSError, ValueError) as error:  # as arrow's errors of reading and format are
                self._broken[number] = " ".join(str(error).split())[:120]
        raise BadImage(self._broken[number])

    def _load(self, number: int) -> Any:
        if number in self._cache:
            if self._bytes > IN_MEMORY_BYTES:
                self._cache.move_to_end(number)
            return self._cache[number]
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._process != os.getpid():  # an open file's position is shared after a fork
            self._open, self._process = {}, os.getpid()
        file, group = self._groups[number]
        if file not in self._open:
            self._open[file] = pq.ParquetFile(self._files[file])
        table = self._open[file].read_row_group(
            group, columns=[self._columns[file]], use_threads=False
        )
        column = table.column(0).combine_chunks()
        if pa.types.is_struct(column.type):
            column = column.field("bytes")
        self._cache[number] = column
        if self._bytes > IN_MEMORY_BYTES and len(self._cache) > GROUPS_KEPT:
            self._cache.popitem(last=False)
        return column

    def read(self, index: int) -> bytes:
        number = bisect.bisect_right(self._starts, index) - 1
        data = self._group(number)[index - self._starts[number]].as_py()
        if not isinstance(data, bytes):
            raise BadImage("no image bytes in this row")
        return data

    def location(self, index: int) -> str:
        number = bisect.bisect_right(self._starts, index) - 1
        file = self._groups[number][0]
        first = self._starts[self._groups.index((file, 0))]
        return f"{self._files[file]} row {index - first}"

    def digest(self, *, whole: bool) -> str:
        """SHA-256 (hex) of the files, as `digest_files` takes it."""
        return digest_files(self._files, whole=whole)


# The hub -----------------------------------------------------------------------------------------


class HubReader:
    """Images of the parts of a hub data set, one after another."""

    def __init__(
        self, name: str, parts: dict[str, Any], column: str, identities: list[Any]
    ) -> None:
        self._name, self._parts, self._column = name, list(parts.items()), column
        self._identities = identities
        self._starts = np.cumsum([0, *(len(part) for part in parts.values())]).tolist()

    def _find(self, index: int) -> tuple[str, Any, int]:
        number = bisect.bisect_right(self._starts, index) - 1
        return *self._parts[number], index - self._starts[number]

    def read(self, index: int) -> bytes:
        _, part, row = self._find(index)
        cell = part[row][self._column]
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data is None and isinstance(cell, dict) and cell.get("path"):
            try:
                data = Path(cell["path"]).read_bytes()
            except OSError as error:
                raise BadImage(error.strerror or "cannot be read") from None
        if not isinstance(data, bytes):
            raise BadImage("no image bytes in this row")
        return data

    def location(self, index: int) -> str:
        part, _, row = self._find(index)
        return f"hub:{self._name} {part} row {row}"

    def digest(self, *, whole: bool) -> str:
        """SHA-256 (hex) of the name on the hub and `_identity` of each part; no image is read."""
        text = json.dumps([self._name, self._identities], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _identity(data: Any) -> list[Any]:
    """What `datasets` knows a part by: its own fingerprint, which for a data set of the hub holds
    name, configuration, version and commit, for one in memory the values; the version; and the
    files it was made of, whose addresses name the commit, with their checksums."""
    sums = data.info.download_checksums or {}
    return [data._fingerprint, str(data.info.version), sorted(map(str, sums.items()))]


def open_hub(name: str) -> Source:
    """Data set `name` (ORG/NAME) of the Hugging Face hub; the only source that uses the network.

    The libraries' reports of usage and counts of downloads are off.
    """
    try:
        import datasets
        import datasets.config
        from huggingface_hub import constants
    except ImportError:
        raise PatchwordError(f"hub:{name} {_INSTALL}") from None
    constants.HF_HUB_DISABLE_TELEMETRY = True
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # network, missing or gated data, bad data: many types
        reason = " ".join(str(error).split())[:200]
        raise PatchwordError(
            f"hub:{name} cannot be loaded ({reason}); check the name and the network"
        ) from None
    parts: dict[str, Any] = {}
    for split in sorted(loaded):
        if (part := SPLITS.get(str(split))) and part not in parts:
            parts[part] = loaded[split]
    if not parts:
        raise PatchwordError(f"hub:{name} has no train, validation or test part")
    features = next(iter(parts.values())).features
    where, advice = f"hub:{name}", "choose another data set"
    image = _column(list(features), IMAGE_COLUMNS, where, advice)
    label = _column(list(features), LABEL_COLUMNS, where, advice)
    keys: list[str] = []
    values: list[Any] = []
    identities: list[Any] = []
    for part, data in list(parts.items()):
        found = list(data.select_columns([label])[:][label])
        if _unlabelled(found, f"hub:{name} {part}"):
            del parts[part]
            continue
        keys += [f"{part}/{row}" for row in range(len(data))]
        values += found
        identities.append([part, *_identity(data)])
        parts[part] = data.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    classes, labels = _classes(values, getattr(features[label], "names", None), f"hub:{name}")
    return Source(
        name=short_name(name.rsplit("/", 1)[-1]),
        classes=classes,
        labels=labels,
        keys=tuple(keys),
        sizes=np.array([len(data) for data in parts.values()], np.int64),
        reader=HubReader(name, parts, image, identities),
        parts=group_parts([key.split("/", 1)[0] for key in keys]),
    )
