"""The folder that `patchword inspect` fills: figures, `summary.json`, `attention_distance.csv`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from patchword.data.files import is_image
from patchword.data.sources import short_name
from patchword.inspection.figures.drawing import Format, encode
from patchword.spec.parse import PatchwordError

SUMMARY = "summary.json"


@dataclass
class Folder:
    """A folder of figures. Raises `PatchwordError` if it holds files that are not to be
    overwritten."""

    path: Path
    kind: Format
    overwrite: bool
    files: list[str] = field(default_factory=list)
    """what has been written, relative to `path`"""

    def __post_init__(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise PatchwordError(f"{self.path} is a file; give a folder as --out")
        if self.path.is_dir() and any(self.path.iterdir()) and not self.overwrite:
            raise PatchwordError(
                f"{self.path} is not empty; give another --out, or pass --overwrite to replace the "
                "figures there"
            )

    def prepare(self) -> None:
        """Make the folder, and take away the figures of an earlier call, which its summary names;
        other files stay."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            earlier = json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))["files"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        root = self.path.resolve()
        for name in earlier if isinstance(earlier, list) else ():
            file = self.path / str(name)
            if file.resolve().is_relative_to(root) and file.is_file():
                file.unlink()

    def draw(self, name: str, figure: Figure) -> None:
        """Write a figure; `name` without suffix."""
        self.write(f"{name}.{self.kind}", encode(figure, self.kind))

    def write(self, name: str, content: bytes) -> None:
        file = self.path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        self.files.append(name)

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write `summary.json`, which it returns, with the names of the files."""
        whole = summary | {"files": [*self.files, SUMMARY]}
        text = json.dumps(whole, separators=(",", ":"), allow_nan=False)
        (self.path / SUMMARY).write_text(text, encoding="utf-8", errors="backslashreplace")
        return whole


def numbers(values: ArrayLike, digits: int = 6) -> Any:
    """Nested lists of floats with so many digits that count; None for what is not finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim:
        return [numbers(row, digits) for row in array]
    value = float(array)
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None


def file_names(keys: Sequence[str]) -> list[str]:
    """Names for the files of images: the last part of each key without an image's suffix, numbered
    where two are the same."""
    names: list[str] = []
    for key in keys:
        last = Path(key).stem if is_image(key) else Path(key).name
        stem = name = short_name(last)[:80]
        number = 1
        while name.casefold() in {other.casefold() for other in names}:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names
