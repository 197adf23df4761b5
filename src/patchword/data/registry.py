"""What kinds of data sets there are, and which of them a name means."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from patchword.data.files import open_folder, open_manifest
from patchword.data.parquet import open_hub, open_parquet, parquet_files
from patchword.data.sources import ArrayReader, Source
from patchword.spec.parse import PatchwordError

ACCEPTED = (
    "a folder with one folder per class, a .csv manifest (path,label[,split]), "
    "a .parquet file or a folder of them, digits, or hub:ORG/NAME"
)


def open_source(name: str) -> Source:
    """The source called `name`: what `ACCEPTED` lists. Raises `PatchwordError`."""
    if name == "digits":
        return _digits()
    if name.startswith("hub:"):
        return open_hub(name.removeprefix("hub:"))
    path = Path(name).expanduser()
    if not path.exists():
        raise PatchwordError(f"no data at {name!r}; give {ACCEPTED}")
    if path.is_file() and path.suffix.lower() == ".csv":
        return open_manifest(path)
    if path.is_file() and path.suffix.lower() == ".parquet":
        return open_parquet(path, [path])
    if path.is_dir():
        if files := parquet_files(path):
            return open_parquet(path, files)
        return open_folder(path)
    raise PatchwordError(f"{name!r} is no data set; give {ACCEPTED}")


def _digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey (UCI Optical Recognition, test part)."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    images = np.rint(np.asarray(values) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return Source(
        name="digits",
        classes=tuple("0123456789"),
        labels=np.asarray(labels).astype(np.int64),
        keys=tuple(f"digits/{i:04}" for i in range(len(images))),
        sizes=np.full(len(images), 64, np.int64),
        reader=ArrayReader(images, "digits"),
        channels=1,
        default_fractions=(0.04, 0.2),
    )
